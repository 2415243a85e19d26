"""The code in scheduler/proto is what the compiler makes of xllm.proto today."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import xllm_compile

ROOT = Path(xllm_compile.__file__).resolve().parents[1]
PROTO = "xllm_compile/scheduler/proto/xllm.proto"

# Numbers of the generator and of the runtime it wants: another grpcio-tools writes others for the same messages.
VERSIONS = re.compile(r"(GRPC_GENERATED_VERSION = .*|# Protobuf Python Version: .*|^    \d+,$)", re.MULTILINE)


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    out = tmp_path_factory.mktemp("proto")
    outputs = [f"--{kind}_out={out}" for kind in ("python", "pyi", "grpc_python")]
    subprocess.run([sys.executable, "-m", "grpc_tools.protoc", "-I.", *outputs, PROTO], cwd=ROOT, check=True)
    return out


@pytest.mark.parametrize("name", ["xllm_pb2.py", "xllm_pb2.pyi", "xllm_pb2_grpc.py"])
def test_checked_in_code_matches_the_proto(generated, name):
    folder = Path(PROTO).parent
    fresh = VERSIONS.sub("", (generated / folder / name).read_text())
    checked_in = VERSIONS.sub("", (ROOT / folder / name).read_text())
    assert fresh == checked_in, f"{name} is stale; run the command at the head of {PROTO}"
