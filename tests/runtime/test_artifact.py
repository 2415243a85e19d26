"""The manifest, and what is said of an artifact that cannot be served here."""

import json
import os
import shutil
from dataclasses import replace

import pytest

from xllm_compile.runtime import artifact
from xllm_compile.runtime.artifact import (
    MANIFEST,
    ArtifactMismatchError,
    Manifest,
    check_artifact,
    is_artifact,
    read_manifest,
    write_manifest,
)
from xllm_compile.runtime.instance import open_instance
from xllm_compile.runtime.instance_config import InstanceConfig
from xllm_compile.runtime.isa import isa_features


@pytest.fixture
def root(family_artifact, tmp_path):
    """A copy of a real artifact, free to be damaged."""
    return shutil.copytree(family_artifact("llama"), tmp_path / "model.xllm")


def refused(root, *said, features=None, **options):
    with pytest.raises(ArtifactMismatchError) as error:
        check_artifact(root, read_manifest(root), isa_features() if features is None else features, **options)
    for part in (str(root), f"xllm-compile MODEL_DIR -o {root}", *said):
        assert part in str(error.value)


def edit(root, **changes):
    values = json.loads((root / MANIFEST).read_text())
    (root / MANIFEST).write_text(json.dumps(values | changes))


def test_a_whole_artifact_passes(root):
    check_artifact(root, read_manifest(root), isa_features(), verify_weights=True)


def test_manifest_round_trip(root, tmp_path):
    manifest = read_manifest(root)
    assert Manifest.from_json(json.loads(json.dumps(manifest.to_json()))) == manifest
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest
    assert (tmp_path / MANIFEST).read_text() == (root / MANIFEST).read_text()
    assert replace(manifest, created="never", pass_seconds=9.0).stable_json() == manifest.stable_json()
    assert replace(manifest, build_key="other").stable_json() != manifest.stable_json()


def test_no_artifact(tmp_path):
    assert not is_artifact(tmp_path)
    with pytest.raises(ArtifactMismatchError, match=f"{tmp_path} is no artifact.*xllm-compile MODEL_DIR"):
        open_instance(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", json.dumps({"schema_version": artifact.SCHEMA_VERSION}), "\xff"])
def test_damaged_manifest(root, text):
    (root / MANIFEST).write_bytes(text.encode("latin-1"))
    with pytest.raises(ArtifactMismatchError, match=r"is damaged.*rebuild it with"):
        read_manifest(root)


def test_manifest_with_a_key_of_another_version(root):
    edit(root, colour="red")
    with pytest.raises(ArtifactMismatchError, match=r"is damaged.*colour"):
        read_manifest(root)


def test_schema_version(root):
    edit(root, schema_version=artifact.SCHEMA_VERSION + 1)
    with pytest.raises(ArtifactMismatchError, match=r"schema version \d+, this version reads \d+; rebuild it with"):
        open_instance(root)


def test_other_torch(root):
    edit(root, versions=read_manifest(root).versions | {"torch": "1.13.0"})
    refused(root, "built with torch 1.13.0, this is torch 2")


def test_missing_cpu_feature(root):
    edit(root, target_features=[*read_manifest(root).target_features, "avx1024"])
    refused(root, "a CPU with avx1024, which this one")
    refused(root, "which this one", features=())


def test_another_target(root):
    edit(root, target="npu", target_features=["Ascend910B3"])
    with pytest.raises(ArtifactMismatchError, match="built for target npu; this version serves cpu artifacts only"):
        open_instance(root)


@pytest.mark.parametrize("what", ["graph", "kernels", "weights"])
def test_missing_truncated_and_damaged_files(root, what):
    manifest = read_manifest(root)
    entry = {"graph": manifest.graphs[1].file, "kernels": manifest.kernels, "weights": manifest.weights[0]}[what]
    assert entry is not None
    path = root / entry.path
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    if what == "weights":
        # Reading them all would cost what mapping saves: only on request.
        check_artifact(root, manifest, isa_features())
        with pytest.raises(ArtifactMismatchError, match="is damaged"):
            open_instance(root, InstanceConfig(verify_weights=True))
    else:
        with pytest.raises(ArtifactMismatchError, match="is damaged"):
            open_instance(root)
    refused(root, str(path), "content does not match", verify_weights=True)
    path.write_bytes(content[:-1])
    refused(root, str(path), f"has {len(content) - 1} bytes, the manifest says {len(content)}")
    os.unlink(path)
    refused(root, f"{path} is missing")
