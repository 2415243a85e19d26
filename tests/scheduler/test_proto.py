"""The code in scheduler/proto is what the compiler makes of the protos today."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import xllm_compile

ROOT = Path(xllm_compile.__file__).resolve().parents[1]
FOLDER = Path("xllm_compile/scheduler/proto")
PROTOS = ("xllm", "etcd")

# Numbers of the generator and of the runtime it wants: another grpcio-tools writes others for the same messages.
VERSIONS = re.compile(r"(GRPC_GENERATED_VERSION = .*|# Protobuf Python Version: .*|^    \d+,$)", re.MULTILINE)


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    out = tmp_path_factory.mktemp("proto")
    outputs = [f"--{kind}_out={out}" for kind in ("python", "pyi", "grpc_python")]
    protos = [str(FOLDER / f"{name}.proto") for name in PROTOS]
    subprocess.run([sys.executable, "-m", "grpc_tools.protoc", "-I.", *outputs, *protos], cwd=ROOT, check=True)
    return out


@pytest.mark.parametrize("suffix", ["_pb2.py", "_pb2.pyi", "_pb2_grpc.py"])
@pytest.mark.parametrize("name", PROTOS)
def test_checked_in_code_matches_the_proto(generated, name, suffix):
    fresh = VERSIONS.sub("", (generated / FOLDER / (name + suffix)).read_text())
    checked_in = VERSIONS.sub("", (ROOT / FOLDER / (name + suffix)).read_text())
    assert fresh == checked_in, f"{name}{suffix} is stale; run `make proto`"
