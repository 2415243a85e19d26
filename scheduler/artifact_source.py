"""What `xllm-serve ARTIFACT` was given: an artifact, or a model directory that has to be compiled first."""

import hashlib
import logging
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


def find_artifact(path: Path, options: Mapping[str, Any]) -> Path:
    """The artifact to open, compiled now if --compile asks for it. Raises ValueError naming the next step."""
    if (path / "manifest.json").is_file():
        return path
    if not path.exists():
        raise ValueError(f"{path} does not exist; build an artifact with: xllm-compile MODEL_DIR -o {path}")
    if not (path / "config.json").is_file():
        raise ValueError(f"{path} is neither an artifact (no manifest.json) nor a model directory (no config.json)")
    if not options["use_compile"]:
        name = path.resolve().name
        raise ValueError(
            f"{path} is a model directory, not an artifact. Compile it once ({compile_estimate(path)}): "
            f"xllm-compile {path} -o {name}.xllm, then: xllm-serve {name}.xllm; or let xllm-serve do both: --compile"
        )
    return _compile(path, options)


def compile_estimate(model_dir: Path) -> str:
    """Roughly how long a first compile takes: the graphs cost the same for every size, the weights are rewritten."""
    num_bytes = sum(file.stat().st_size for file in model_dir.glob("*.safetensors"))
    # Measured on two cores: about a minute of C++ compiler, then some 200 MB/s through the disk.
    minutes = 1 + num_bytes / 200e6 / 60
    return f"about {minutes:.0f} min on a small machine"


def _compile(model_dir: Path, options: Mapping[str, Any]) -> Path:
    """Run the compiler as its own process: the server must not carry it. A build that is up to date is a quick no."""
    output = cache_path(model_dir)
    output.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "xllm_compile.cli", str(model_dir), "-o", str(output)]
    for option in ("max_model_len", "max_num_batched_tokens"):
        if options[option] is not None:
            command += [f"--{option.replace('_', '-')}", str(options[option])]
    logger.info("compiling %s into %s", model_dir, output)
    # stdout is for the ready line alone.
    done = subprocess.run(command, stdout=sys.stderr, check=False)
    if done.returncode != 0:
        raise ValueError(f"compiling {model_dir} failed with exit code {done.returncode}; its message is above")
    return output


def cache_path(model_dir: Path) -> Path:
    """One place per model directory under $XDG_CACHE_HOME; the compiler sees by itself when the model changed."""
    resolved = model_dir.resolve()
    root = os.environ.get("XDG_CACHE_HOME")
    cache = Path(root) if root else Path.home() / ".cache"
    digest = hashlib.sha256(str(resolved).encode()).hexdigest()[:12]
    return cache / "xllm-compile" / "models" / f"{resolved.name}-{digest}.xllm"
