"""The artifact on disk: the contract between build and serve. The driver writes it through this module.

model.xllm/
  manifest.json     everything but bytes of weights and code; read and checked first
  weights/          model.safetensors in the layout the graphs want, memory-mapped; one file per tensor-parallel rank
  graphs/           one library per (region, bucket), the kernels, and each region's program as text
  tokenizer/        tokenizer.json, chat template, generation defaults
  report/           what each pass did
"""

import json
import math
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from xllm_compile import __version__
from xllm_compile.graph_passes.step_cost import StepTimes
from xllm_compile.runtime.ops.kv_rows import row_width
from xllm_compile.runtime.program import RegionProgram

SCHEMA_VERSION = 5
MANIFEST = "manifest.json"
WEIGHTS = "weights/model.safetensors"
"""The weights file of an instance of one rank; see weights_path."""
KERNELS = "graphs/kernels.so"
TOKENIZER = "tokenizer"
REPORT = "report"


class ArtifactMismatchError(ValueError):
    """The artifact cannot be served here: damaged, incomplete, or built for something else. Names what differs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelInfo:
    """What serving needs to know of the model."""

    name: str
    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_kv_heads: int
    """Those that one tensor-parallel rank holds."""
    head_dim: int
    dtype: str
    kv_cache_dtype: str
    """dtype, or int8."""
    max_model_len: int

    @property
    def kv_layer_shape(self) -> tuple[int, int, int]:
        """Of what one layer and rank hold of a token."""
        return (2, self.num_kv_heads, row_width(self.head_dim, is_int8=self.kv_cache_dtype == "int8"))

    @property
    def kv_bytes_per_token(self) -> int:
        """On each rank."""
        itemsize: int = getattr(torch, self.kv_cache_dtype).itemsize
        return self.num_layers * math.prod(self.kv_layer_shape) * itemsize


@dataclass(frozen=True, kw_only=True, slots=True)
class FileEntry:
    """A file of the artifact, its size and the xxh3-128 of its content."""

    path: str
    num_bytes: int
    digest: str


@dataclass(frozen=True, kw_only=True, slots=True)
class GraphEntry:
    """One compiled graph. ``sizes`` are the symbols it fixes; empty is the dynamic-shape graph."""

    region: str
    sizes: dict[str, int]
    key: str
    file: FileEntry


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    schema_version: int
    build_key: str
    """Hash of everything the build depends on; equal keys mean there is nothing to do."""
    model: ModelInfo
    model_config: dict[str, Any]
    config_hash: str
    target: str
    target_features: tuple[str, ...]
    versions: dict[str, str]
    passes: tuple[dict[str, Any], ...]
    graph_mode: str
    """full, partial or eager: see xllm-compile --graph-mode."""
    token_buckets: tuple[int, ...]
    logits_buckets: tuple[int, ...]
    buckets_reason: str
    step_times: dict[str, StepTimes]
    """By axis ("T", "R"): predicted seconds of a step by its size."""
    device_spec: dict[str, Any]
    """What they were predicted with: a DeviceSpec as JSON, and its ``origin``."""
    max_num_batched_tokens: int
    tensor_parallel_size: int
    programs: tuple[RegionProgram, ...]
    split_buckets: tuple[int, ...]
    """Token buckets whose steps run in two halves, one computing while the other's collective is on its way."""
    split_programs: tuple[RegionProgram, ...]
    """What they run, under the region's name with ".split" behind it."""
    graphs: tuple[GraphEntry, ...]
    kernels: FileEntry | None
    """Our own kernels; None on a target whose operators come with its runtime."""
    weights: tuple[FileEntry, ...]
    """One file per rank; graphs are the same for all of them."""
    weights_key: str
    memory_plan: dict[str, int]
    """weights_bytes, kv_bytes_per_token, and activation_bytes: the pool that all graphs share."""
    graph_plans: tuple[dict[str, Any], ...]
    """Where each graph's intermediates lie in the pool: graph_passes.memory_plan.GraphPlan as JSON."""
    quantisation: str | None
    created: str
    pass_seconds: float
    """What the graph passes took of the build."""

    @property
    def tokens_key(self) -> str:
        """Names what tokens and their KV are computed with: weights and the model's config."""
        return f"{self.weights_key}-{self.config_hash}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Manifest":
        return cls(
            **{
                **values,
                "kernels": values["kernels"] and FileEntry(**values["kernels"]),
                "weights": tuple(FileEntry(**entry) for entry in values["weights"]),
                "model": ModelInfo(**values["model"]),
                "target_features": tuple(values["target_features"]),
                "graph_plans": tuple(values["graph_plans"]),
                "passes": tuple(values["passes"]),
                "token_buckets": tuple(values["token_buckets"]),
                "logits_buckets": tuple(values["logits_buckets"]),
                "step_times": {axis: StepTimes.from_json(times) for axis, times in values["step_times"].items()},
                "split_buckets": tuple(values["split_buckets"]),
                "split_programs": tuple(RegionProgram.from_json(program) for program in values["split_programs"]),
                "programs": tuple(RegionProgram.from_json(program) for program in values["programs"]),
                "graphs": tuple(GraphEntry(**{**g, "file": FileEntry(**g["file"])}) for g in values["graphs"]),
            }
        )

    def stable_json(self) -> dict[str, Any]:
        """The manifest without what two builds of the same inputs may differ in."""
        return {key: value for key, value in self.to_json().items() if key not in ("created", "pass_seconds")}


def runtime_versions() -> dict[str, str]:
    """Versions that compiled code depends on."""
    return {"xllm_compile": __version__, "torch": torch.__version__}


def weights_path(rank: int, tensor_parallel_size: int) -> str:
    """The weights file of a rank, relative to the artifact."""
    return WEIGHTS if tensor_parallel_size == 1 else f"weights/rank{rank}-of-{tensor_parallel_size}.safetensors"


def is_artifact(path: Path) -> bool:
    return (path / MANIFEST).is_file()


def file_entry(root: Path, path: str) -> FileEntry:
    """Describe root/path."""
    file = root / path
    return FileEntry(path=path, num_bytes=file.stat().st_size, digest=file_digest(file))


def file_digest(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(16 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def write_manifest(root: Path, manifest: Manifest) -> None:
    (root / MANIFEST).write_text(json.dumps(manifest.to_json(), indent=1, sort_keys=True) + "\n")


def read_manifest(root: Path) -> Manifest:
    """The manifest of an artifact, unchecked against this machine. Raises ArtifactMismatchError."""
    path = root / MANIFEST
    if not path.is_file():
        raise ArtifactMismatchError(f"{root} is no artifact: no {MANIFEST}; build it: xllm-compile MODEL_DIR -o {root}")
    try:
        values = json.loads(path.read_text())
        version = values["schema_version"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as err:
        raise ArtifactMismatchError(f"{path} is damaged ({err!r}); {_rebuild(root)}") from err
    if version != SCHEMA_VERSION:
        raise ArtifactMismatchError(
            f"{root} has schema version {version}, this version reads {SCHEMA_VERSION}; {_rebuild(root)}"
        )
    try:
        return Manifest.from_json(values)
    except (KeyError, TypeError, ValueError) as err:
        raise ArtifactMismatchError(f"{path} is damaged ({err!r}); {_rebuild(root)}") from err


def check_artifact(root: Path, manifest: Manifest, features: tuple[str, ...], *, verify_weights: bool = False) -> None:
    """Raise ArtifactMismatchError unless the artifact can be served by this installation on this machine.

    ``features`` are those of the present device. Code is checked byte for byte; weights by size, and byte for byte
    with ``verify_weights`` (a read of the whole file).
    """
    versions = runtime_versions()
    for name, built_with in manifest.versions.items():
        if name in versions and versions[name] != built_with:
            raise ArtifactMismatchError(
                f"{root} was built with {name} {built_with}, this is {name} {versions[name]}; {_rebuild(root)}"
            )
    missing = sorted(set(manifest.target_features) - set(features))
    if missing:
        raise ArtifactMismatchError(
            f"{root} was built for a CPU with {', '.join(missing)}, which this one ({platform.machine()}) lacks;"
            f" {_rebuild(root)}"
        )
    for entry in [*(graph.file for graph in manifest.graphs), *filter(None, [manifest.kernels])]:
        _check_file(root, entry, is_hashed=True)
    for weights in manifest.weights:
        _check_file(root, weights, is_hashed=verify_weights)


def cpu_kernels(root: Path, manifest: Manifest) -> FileEntry:
    """The kernel library of an artifact for the CPU. Raises ArtifactMismatchError for any other target."""
    if manifest.target != "cpu" or manifest.kernels is None:
        raise ArtifactMismatchError(
            f"{root} was built for target {manifest.target}; this version serves cpu artifacts only:"
            f" build one with xllm-compile MODEL_DIR -o {root} --target cpu"
        )
    return manifest.kernels


def is_intact(root: Path, entry: FileEntry) -> bool:
    """Whether the file is there with the content the manifest says."""
    try:
        _check_file(root, entry, is_hashed=True)
    except ArtifactMismatchError:
        return False
    return True


def _check_file(root: Path, entry: FileEntry, *, is_hashed: bool) -> None:
    path = root / entry.path
    if not path.is_file():
        raise ArtifactMismatchError(f"{path} is missing; {_rebuild(root)}")
    size = path.stat().st_size
    if size != entry.num_bytes:
        raise ArtifactMismatchError(f"{path} has {size} bytes, the manifest says {entry.num_bytes}; {_rebuild(root)}")
    if is_hashed and file_digest(path) != entry.digest:
        raise ArtifactMismatchError(f"{path} is damaged: its content does not match the manifest; {_rebuild(root)}")


def _rebuild(root: Path) -> str:
    return f"rebuild it with: xllm-compile MODEL_DIR -o {root}"
