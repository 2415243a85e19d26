"""A null Ascend device: one shared library in the place of all of CANN's, so that torch_npu can be imported and
TorchAir can turn FX graphs into GE graphs on a machine that has neither an NPU nor CANN.

Every symbol that the installed torch_npu links against or looks up in CANN's libraries becomes a trampoline that traces
its name and returns 0; acl.cpp and ge.cpp define the few that must answer. Nothing of torch_npu or CANN is copied or
changed. What a graph compiled on it does not prove is listed in tests/npu/README.md.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import xxhash

SOURCES = ("acl.cpp", "ge.cpp")
_LIBRARY = "libascendcl.so"
_SYSTEM_LIBRARIES = (
    "libstdc++.so.6",
    "libm.so.6",
    "libgcc_s.so.1",
    "libpthread.so.0",
    "libc.so.6",
    "libdl.so.2",
    "librt.so.1",
    "ld-linux-x86-64.so.2",
)
# Libraries that torch_npu opens by a name that is composed at run time.
_OPENED_LATER = {"libnnopbase.so", "libopapi.so", "libatb.so"}
# Names in torch_npu's libraries that look like CANN's and are torch's, the system's or optional tools.
_NOT_CANN = re.compile(
    r"lib(torch|c10|c\.|m\.|gcc|stdc|pthread|dl|rt\.|npu_profiler|tensorpipe|mspti|ascend_kernel|ms_|omp|gomp)"
)


class NullDeviceError(RuntimeError):
    """The null device cannot be built here; the message ends with the next step."""


def ensure_null_device(cache: Path) -> Path:
    """The folder with the library and its names, built below ``cache`` where it is missing: about 4 s.

    Raises NullDeviceError without torch_npu, a C++ compiler or binutils, and on machines other than x86-64.
    """
    package = _torch_npu_folder()
    if platform.machine() != "x86_64":
        raise NullDeviceError(
            f"the null NPU device is for x86-64, this is {platform.machine()}; compile on an x86-64 host"
        )
    compiler = os.environ.get("CXX", "g++")
    for tool, debian in ((compiler, "g++"), ("nm", "binutils"), ("readelf", "binutils")):
        if shutil.which(tool) is None:
            raise NullDeviceError(
                f"no {tool!r} on PATH, which the null NPU device is built with; apt-get install {debian}"
            )
    folder = cache / f"null-npu-{_key(compiler)}"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(dir=cache, prefix=".null-npu-"))
        try:
            _build(package, compiler, building)
            os.rename(building, folder)
        except OSError:
            # Another build made it meanwhile.
            if not folder.is_dir():
                raise
        finally:
            shutil.rmtree(building, ignore_errors=True)
    return folder


def _torch_npu_folder() -> Path:
    package = Path(sysconfig.get_paths()["platlib"]) / "torch_npu"
    if not package.is_dir():
        raise NullDeviceError(
            "target npu needs torch_npu, which this Python does not have; install it in an environment of its own:"
            " pip install 'xllm-compile[npu]'"
        )
    return package


def torch_npu_version() -> str:
    """Of the installed torch_npu. Raises NullDeviceError when there is none."""
    _torch_npu_folder()
    try:
        return version("torch_npu")
    except PackageNotFoundError as err:
        raise NullDeviceError("torch_npu has no package metadata; reinstall it with pip") from err


def _key(compiler: str) -> str:
    sources = [Path(__file__).with_name(name).read_bytes() for name in (Path(__file__).name, *SOURCES)]
    return xxhash.xxh3_64(b"\0".join([*sources, torch_npu_version().encode(), compiler.encode()])).hexdigest()


def _build(package: Path, compiler: str, output: Path) -> None:
    libraries = sorted(package.rglob("*.so"))
    provided = _symbols([*libraries, *_providers(package)], "--defined-only")
    linked = _symbols(libraries, "--undefined-only") - provided
    looked_up, opened = _strings(libraries)
    symbols = sorted(linked | looked_up)
    (output / "trampolines.S").write_text(_assembly(symbols))
    folder = Path(__file__).parent
    include = package / "include" / "third_party" / "acl" / "inc"
    common = [*compiler.split(), "-std=c++17", "-O1", "-fPIC", "-w"]
    _run([*common, "-D_GLIBCXX_USE_CXX11_ABI=0", "-c", str(folder / "ge.cpp"), "-o", str(output / "ge.o")])
    parts = [str(output / "trampolines.S"), str(folder / "acl.cpp"), str(output / "ge.o")]
    _run([*common, "-shared", *parts, f"-I{include}", f"-Wl,-soname,{_LIBRARY}", "-o", str(output / _LIBRARY)])
    own = {library.name for library in libraries}
    for name in (opened | _needed(libraries) | _OPENED_LATER) - own - {_LIBRARY}:
        if not _NOT_CANN.match(name):
            (output / name).symlink_to(_LIBRARY)


def _providers(package: Path) -> list[Path]:
    """Libraries whose symbols are real: torch's, Python's and the system's."""
    listing = _run(["ldconfig", "-p"])
    found = [re.search(rf"^\s*{re.escape(name)} .*x86-64.*=> (\S+)", listing, re.M) for name in _SYSTEM_LIBRARIES]
    system = [Path(match.group(1)) for match in found if match]
    python = [Path(os.path.realpath(sys.executable)), *Path(sysconfig.get_config_var("LIBDIR")).glob("libpython3*.so*")]
    return [*(package.parent / "torch" / "lib").glob("*.so*"), *system, *python]


def _symbols(files: Iterable[Path], kind: str) -> set[str]:
    names = set()
    for file in files:
        for line in _run(["nm", "-D", kind, str(file)]).splitlines():
            fields = line.split()
            # Weak undefined symbols ("w") may stay undefined.
            if fields and (kind == "--defined-only" or fields[0] == "U"):
                names.add(fields[-1].partition("@")[0])
    return names


def _strings(libraries: Iterable[Path]) -> tuple[set[str], set[str]]:
    """Names that are looked up with dlsym, and libraries that are opened with dlopen: constants of the code."""
    functions: set[str] = set()
    opened: set[str] = set()
    for library in libraries:
        content = library.read_bytes()
        found = re.findall(rb"\0((?:aclnn|aclrt|aclmdl|acl[A-Z]|Hccl|hccl)[A-Za-z0-9_]{2,80})(?=\0)", content)
        functions |= {name.decode() for name in found}
        opened |= {name.decode() for name in re.findall(rb"\0(lib[A-Za-z0-9_+-]+\.so)(?=\0)", content)}
    # The second function of each operator's pair is looked up by a composed name.
    pairs = {name + "GetWorkspaceSize" for name in functions if name.startswith("aclnn")}
    return functions | pairs, opened


def _needed(libraries: Iterable[Path]) -> set[str]:
    listings = [_run(["readelf", "-d", str(library)]) for library in libraries]
    return {name for listing in listings for name in re.findall(r"NEEDED.*\[(lib\S+?\.so)\]", listing)}


def _assembly(symbols: list[str]) -> str:
    """Weak definitions, so that acl.cpp and ge.cpp win: each passes its name on and returns what null_npu_call does."""
    lines = [".text"]
    for index, name in enumerate(symbols):
        lines += [f".globl {name}", f".weak {name}", f".type {name}, @function", f"{name}:"]
        lines += [f" leaq .Lname{index}(%rip), %rdi", " jmp null_npu_call@PLT"]
    lines += [".section .rodata"]
    lines += [f'.Lname{index}: .asciz "{name}"' for index, name in enumerate(symbols)]
    return "\n".join([*lines, '.section .note.GNU-stack, "", @progbits', ""])


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        # nm says so of a library without dynamic symbols: there is nothing to collect.
        if command[0] == "nm" and "no symbols" in done.stderr:
            return ""
        tail = " ".join(done.stderr.split()[-60:])
        raise NullDeviceError(f"{command[0]} failed while building the null NPU device: {tail}; check the toolchain")
    return done.stdout
