"""A Hugging Face checkpoint's tensors: sharded or single safetensors files, checked before anything is built."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
FLOAT_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_HASH_CHUNK_BYTES = 16 << 20


class CheckpointError(ValueError):
    """The checkpoint is incomplete, damaged or not of the shape its config.json says."""


class Checkpoint:
    """Read access to the tensors of one model directory. Opens every shard's header; tensors are read on demand.

    Raises CheckpointError when a shard is missing or truncated.
    """

    def __init__(self, model_dir: Path) -> None:
        self.model_dir = model_dir
        self._file_of = self._locate()
        self._handles = {name: _open(model_dir / name) for name in sorted(set(self._file_of.values()))}
        self._check_index()

    def _locate(self) -> dict[str, str]:
        """Tensor name -> file name."""
        index = self.model_dir / INDEX_FILE
        if index.is_file():
            try:
                weight_map = dict(json.loads(index.read_text())["weight_map"])
            except (KeyError, TypeError, ValueError) as err:
                raise CheckpointError(f"{index} is no safetensors index ({err!r}); fetch the checkpoint again") from err
            missing = sorted({name for name in weight_map.values() if not (self.model_dir / name).is_file()})
            if missing:
                raise CheckpointError(
                    f"{self.model_dir} lacks {len(missing)} shards that {INDEX_FILE} names: {', '.join(missing[:3])};"
                    " fetch the checkpoint again"
                )
            return weight_map
        single = self.model_dir / SINGLE_FILE
        if not single.is_file():
            found = sorted(path.name for path in self.model_dir.glob("*.bin")) or ["nothing"]
            raise CheckpointError(
                f"{self.model_dir} has neither {SINGLE_FILE} nor {INDEX_FILE} (found {found[0]});"
                " convert the checkpoint to safetensors"
            )
        return dict.fromkeys(_open(single).keys(), SINGLE_FILE)

    def _check_index(self) -> None:
        for name, file in self._file_of.items():
            if name not in self._handles[file].keys():  # noqa: SIM118  (safe_open has no __contains__)
                raise CheckpointError(
                    f"{INDEX_FILE} places {name} in {file}, which lacks it; fetch the checkpoint again"
                )

    def check(
        self, expected: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, tuple[str, ...]] | None = None
    ) -> None:
        """Every expected tensor is there with its shape, and a dtype of ``dtypes`` or else a floating one.

        Raises CheckpointError naming the first that is not.
        """
        for name, shape in expected.items():
            if name not in self._file_of:
                raise CheckpointError(
                    f"checkpoint lacks tensor {name} of shape {list(shape)} ({len(self._file_of)} tensors present);"
                    " config.json and weights do not belong together"
                )
            view = self._handles[self._file_of[name]].get_slice(name)
            if tuple(view.get_shape()) != shape:
                raise CheckpointError(
                    f"tensor {name} has shape {list(view.get_shape())}, config.json asks for {list(shape)};"
                    " config.json and weights do not belong together"
                )
            supported = (dtypes or {}).get(name, tuple(FLOAT_DTYPES))
            if view.get_dtype() not in supported:
                raise CheckpointError(
                    f"tensor {name} has dtype {view.get_dtype()}; supported: {', '.join(supported)}."
                    " Use an unquantised checkpoint"
                )

    def tensor(self, name: str) -> Tensor:
        """The tensor as stored, memory-mapped."""
        tensor: Tensor = self._handles[self._file_of[name]].get_tensor(name)
        return tensor

    def content_hash(self) -> str:
        """Hash of all shards' bytes; covers no path and no time."""
        digest = xxhash.xxh3_128()
        for name in sorted(self._handles):
            digest.update(name.encode() + b"\0")
            for chunk in _chunks(self.model_dir / name):
                digest.update(chunk)
        return digest.hexdigest()


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as err:
        size = path.stat().st_size if path.exists() else 0
        raise CheckpointError(
            f"{path} ({size} bytes) is truncated or damaged ({err}); fetch the checkpoint again"
        ) from err


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(_HASH_CHUNK_BYTES):
            yield chunk
