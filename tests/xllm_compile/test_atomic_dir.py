"""A directory is written whole or not at all, whatever ends the writer."""

import multiprocessing
import signal

import pytest

from xllm_compile.atomic_dir import atomic_directory


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_new_directory(tmp_path):
    output = tmp_path / "deep" / "out"
    with atomic_directory(output) as root:
        (root / "file").write_text("new")
        assert not output.exists()
    assert (output / "file").read_text() == "new"
    assert names(output.parent) == ["out"]


def test_replaces_whole(tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "old").write_text("old")
    with atomic_directory(output) as root:
        assert names(root) == []
        (root / "new").write_text("new")
        assert names(output) == ["old"]
    assert names(output) == ["new"] and names(tmp_path) == ["out"]


@pytest.mark.parametrize("existed", [False, True])
def test_an_error_leaves_what_was_there(tmp_path, existed):
    output = tmp_path / "out"
    if existed:
        output.mkdir()
        (output / "old").write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_directory(output) as root:
        (root / "half").write_text("half")
        raise KeyboardInterrupt
    assert names(tmp_path) == (["out"] if existed else [])
    assert not existed or names(output) == ["old"]


def write_until_killed(output, ready):
    with atomic_directory(output) as root:
        (root / "half").write_text("half")
        ready.set()
        signal.pause()


def test_a_killed_writer_leaves_the_old_one_and_the_next_clears_up(tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "old").write_text("old")
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    writer = context.Process(target=write_until_killed, args=(output, ready))
    writer.start()
    assert ready.wait(60)
    with pytest.raises(ValueError, match=f"another build is writing {output}; wait"), atomic_directory(output):
        pass
    # The refusal disturbed nothing of the other's.
    assert (tmp_path / ".out.building" / "half").exists()
    writer.kill()
    writer.join()
    assert names(output) == ["old"]
    with atomic_directory(output) as root:
        assert names(root) == []
        (root / "new").write_text("new")
    assert names(output) == ["new"] and names(tmp_path) == ["out"]


def test_two_outputs_side_by_side(tmp_path):
    with atomic_directory(tmp_path / "a") as a, atomic_directory(tmp_path / "b") as b:
        assert a != b
    assert names(tmp_path) == ["a", "b"]


def test_the_output_is_a_file(tmp_path):
    output = tmp_path / "out"
    output.write_text("mine")
    with pytest.raises(NotADirectoryError, match="exists and is no directory"), atomic_directory(output) as root:
        (root / "new").write_text("new")
    assert output.read_text() == "mine" and names(tmp_path) == ["out"]
