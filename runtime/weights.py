"""The artifact's weights file: written once by the driver, memory-mapped by every instance, never copied.

The format is safetensors. Packed tensors come first and the header is padded, so each of them starts on a cache line.
"""

import ctypes
import json
import mmap
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from xllm_compile.runtime.artifact import ArtifactMismatchError
from xllm_compile.runtime.ops.spec import WeightSpec

_DTYPE_NAMES = {"bfloat16": "BF16", "float32": "F32", "int8": "I8", "uint8": "U8"}
_DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32, "I8": torch.int8, "U8": torch.uint8}
_ALIGNMENT = 64


def write_weights(
    path: Path,
    specs: Sequence[WeightSpec],
    make: Callable[[WeightSpec], Tensor],
    on_tensor: Callable[[int], None] = lambda num_bytes: None,
) -> None:
    """Stream the tensors to ``path``; one is in memory at a time.

    ``specs`` name each tensor exactly (no ``{layer}``). ``make`` returns the tensor a spec describes;
    ``on_tensor`` hears the bytes of each one written. Raises OSError (a full disk) with a partial file left behind.
    """
    # Packed tensors are whole cache lines, in any order; a quantised one and its scales are made together, so by name.
    # Of the others the wider dtype first: every tensor is aligned to its elements.
    ordered = sorted(specs, key=lambda spec: (not spec.is_packed, 0 if spec.is_packed else -_itemsize(spec), spec.name))
    header: dict[str, object] = {}
    offset = 0
    for spec in ordered:
        num_bytes = _num_bytes(spec)
        header[spec.name] = {
            "dtype": _DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + num_bytes],
        }
        offset += num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for spec in ordered:
            tensor = make(spec).contiguous()
            if tuple(tensor.shape) != spec.shape or str(tensor.dtype) != f"torch.{spec.dtype}":
                raise AssertionError(f"{spec.name} was made as {tensor.dtype}{list(tensor.shape)}, spec is {spec}")
            file.write(tensor.view(torch.uint8).numpy().data)
            on_tensor(tensor.nbytes)


def map_weights(path: Path) -> dict[str, Tensor]:
    """All tensors of a weights file, as views of one private mapping that lives as long as any of them.

    Raises ArtifactMismatchError when the header does not fit the file.
    """
    with path.open("rb") as file:
        # Copy-on-write, so torch may treat it as writable; nothing writes, so nothing is copied.
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    try:
        (header_bytes,) = struct.unpack_from("<Q", mapping, 0)
        header = json.loads(mapping[8 : 8 + header_bytes])
        start = 8 + header_bytes
        return {
            name: torch.frombuffer(
                mapping,
                dtype=_DTYPES[entry["dtype"]],
                count=(entry["data_offsets"][1] - entry["data_offsets"][0]) // _DTYPES[entry["dtype"]].itemsize,
                offset=start + entry["data_offsets"][0],
            ).view(entry["shape"])
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except (struct.error, ValueError, KeyError, RuntimeError) as err:
        raise ArtifactMismatchError(f"{path} is damaged ({err}); rebuild the artifact with xllm-compile") from err


def release_weights(weights: Mapping[str, Tensor], path: Path, *, from_cache: bool) -> None:
    """Give the memory of what map_weights mapped from path back; it comes from the file again when it is next read.

    The system still has the file in its page cache, unless ``from_cache``. No step may be under way.
    """
    begin = min(tensor.data_ptr() for tensor in weights.values())
    end = max(tensor.data_ptr() + tensor.nbytes for tensor in weights.values())
    begin = begin // mmap.PAGESIZE * mmap.PAGESIZE
    # Nothing was ever written to the private mapping, so dropping its pages loses nothing.
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    if madvise(begin, end - begin, mmap.MADV_DONTNEED) != 0:
        raise OSError(ctypes.get_errno(), f"the weights of {path} cannot be given back")
    if from_cache:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _num_bytes(spec: WeightSpec) -> int:
    count = 1
    for size in spec.shape:
        count *= size
    return count * _itemsize(spec)


def _itemsize(spec: WeightSpec) -> int:
    return int(getattr(torch, spec.dtype).itemsize)
