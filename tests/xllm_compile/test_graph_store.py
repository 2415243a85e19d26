import os

from xllm_compile.graph_store import GraphStore, graph_key, link_or_copy


def stored(tmp_path, **sizes):
    store = GraphStore(tmp_path)
    for age, (key, size) in enumerate(sizes.items()):
        store.path(key).write_bytes(b"x" * size)
        os.utime(store.path(key), (1000 + age, 1000 + age))
    return store


def test_find(tmp_path):
    store = stored(tmp_path, a=1)
    assert store.find("a") == store.path("a")
    assert store.find("b") is None


def test_adopted_files_are_found_but_the_stores_own_come_first(tmp_path):
    store = stored(tmp_path / ".", a=1)
    other = tmp_path / "artifact.so"
    other.write_bytes(b"y")
    store.adopt("a", other)
    store.adopt("b", other)
    store.adopt("c", tmp_path / "gone.so")
    assert store.find("a") == store.path("a")
    assert store.find("b") == other
    assert store.find("c") is None


def test_trim_keeps_what_was_used_last(tmp_path):
    store = stored(tmp_path, old=40, used=40, new=40)
    store.find("used")
    store.trim(80)
    assert [key for key in ("old", "used", "new") if store.find(key)] == ["used", "new"]
    store.trim(1000)
    assert store.find("used") and store.find("new")
    store.trim(0)
    assert list(tmp_path.glob("*.so")) == []


def test_trim_clears_what_killed_builds_left(tmp_path):
    store = stored(tmp_path, a=1)
    for name in (".inductor-old", ".kernels-old", ".inductor-now"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
        if name.endswith("old"):
            os.utime(tmp_path / name, (1000, 1000))
    store.trim(1000)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".inductor-now", "a.so"]


def test_links_share_the_content_and_replacing_one_leaves_the_other(tmp_path):
    source, target = tmp_path / "a", tmp_path / "b"
    source.write_text("one")
    link_or_copy(source, target)
    assert source.stat().st_ino == target.stat().st_ino
    replacement = tmp_path / "c"
    replacement.write_text("two")
    os.replace(replacement, source)
    assert target.read_text() == "one"


def test_keys_tell_parts_apart():
    assert graph_key(["ab", "c"]) != graph_key(["a", "bc"]) != graph_key(["a", "b", "c"])
    assert graph_key(["a", "b"]) == graph_key(["a", "b"])
