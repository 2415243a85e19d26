"""The links, the names and the commands that an installation promises."""

import importlib
import importlib.metadata
import os
import pkgutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import xllm_compile

REPOSITORY = Path(__file__).resolve().parents[1]
PARTS = ("graph_passes", "runtime", "models", "scheduler", "benchmarks")
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
# Run by the Python of another engine's environment, which alone has what they import.
ELSEWHERE = tuple(f"xllm_compile.benchmarks.{name}" for name in ("engine_llama", "engine_openvino", "gguf_file"))
# Training a demo model wants transformers, and its modules are no part of building or serving.
NEEDS_DEV = ("xllm_compile.models.demo",)


@pytest.mark.parametrize("part", PARTS)
def test_links_are_relative_and_resolve(part):
    link = REPOSITORY / "xllm_compile" / part
    assert os.readlink(link) == f"../{part}"
    assert link.resolve() == REPOSITORY / part
    assert (link / "__init__.py").is_file()


@pytest.mark.parametrize("part", PARTS)
def test_bare_names_are_refused(part):
    done = subprocess.run(
        [sys.executable, "-c", f"import {part}"], capture_output=True, text=True, check=False, cwd=REPOSITORY
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"ImportError: import this package as xllm_compile.{part}"


def module_names():
    def failed(name):
        raise ImportError(name)

    found = pkgutil.walk_packages(xllm_compile.__path__, "xllm_compile.", onerror=failed)
    return sorted(info.name for info in found)


def test_every_module_imports():
    names = module_names()
    assert {f"xllm_compile.{part}" for part in PARTS} <= set(names)
    sources = {path for part in ("xllm_compile", *PARTS) for path in (REPOSITORY / part).rglob("*.py")}
    assert len(names) >= len({path for path in sources if path.name != "__init__.py"})
    assert set(ELSEWHERE) <= set(names)
    for name in set(names) - set(ELSEWHERE):
        importlib.import_module(name)


def test_the_version_is_one():
    assert xllm_compile.__version__ == PROJECT["version"] == importlib.metadata.version("xllm-compile")


@pytest.mark.parametrize("command", sorted(PROJECT["scripts"]))
def test_commands_answer_help(command):
    module, _, function = PROJECT["scripts"][command].partition(":")
    assert callable(getattr(importlib.import_module(module), function))
    script = Path(sys.executable).with_name(command)
    done = subprocess.run([script, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"Usage: {command} ")
