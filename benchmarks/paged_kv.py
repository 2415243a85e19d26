"""The ordinary alternative to mapped ranges: KV in blocks that a block table names, read by the same kernels.

The attention kernels of runtime/ops/cpu are built a second time with their address arithmetic exchanged for a look-up
in a block table of 16 tokens: the loops, the products and the prefetches are the same.
"""

import ctypes
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from xllm_compile.runtime.ops import native

if TYPE_CHECKING:
    from torch import Tensor

BLOCK_TOKENS = 16

_CHANGES: dict[str, tuple[tuple[str, str], ...]] = {
    "step.h": (
        (
            "// [slots, max_tokens, 2, heads, head_dim], any",
            "inline const int32_t* block_table = nullptr;\n\n// [slots, max_tokens, 2, heads, head_dim], any",
        ),
        (
            "slot * view.strides[0] + position * view.strides[1] +",
            "(block_table[slot * (max_tokens / 16) + position / 16] * 16 + position % 16) * view.strides[1] +",
        ),
    ),
    "attention_tile.h": (
        (
            "  const C* even = block.p.cache.value<const C>(block.slot, block.keys.begin, block.head) + column;\n",
            "",
        ),
        (
            "for (int64_t k = 0; k < count; k += kPair<T>, even += kPair<T> * stride) {",
            "for (int64_t k = 0; k < count; k += kPair<T>) {\n"
            "    const C* even = block.p.cache.value<const C>(block.slot, block.keys.begin + k, block.head) + column;",
        ),
        (
            "    s.tokens_ = std::max<int64_t>(0, end - begin);",
            "    s.tokens_ = std::max<int64_t>(0, end - begin);\n"
            "    s.position_ = begin;\n"
            "    s.table_ = block_table + p.slot[item.sequence] * (p.cache.max_tokens / 16);\n"
            "    s.base_ = reinterpret_cast<const char*>(p.cache.view.ptr<const C>());\n"
            "    s.base_ += item.head_begin * s.head_stride_;",
        ),
        (
            "      token_ += token_stride_;\n      if (--tokens_ == 0) return false;",
            "      if (--tokens_ == 0) return false;\n"
            "      ++position_;\n"
            "      token_ = base_ + (int64_t(table_[position_ / 16]) * 16 + position_ % 16) * token_stride_;",
        ),
        (
            "  const char *token_, *at_ = nullptr;",
            "  const char *token_, *base_, *at_ = nullptr;\n  const int32_t* table_;\n  int64_t position_;",
        ),
    ),
}
_SETTER = """#include "step.h"
XLLM_EXPORT void xllm_set_block_table(const int32_t* table) { xllm::block_table = table; }
"""


class PagedKernels:
    """The kernels over blocks. Raises RuntimeError when the sources are no longer those that this knows to change."""

    def __init__(self, folder: Path) -> None:
        sources = folder / "paged"
        shutil.copytree(native.SOURCE_FOLDER, sources)
        for name, changes in _CHANGES.items():
            text = (sources / name).read_text()
            for old, new in changes:
                if text.count(old) != 1:
                    raise RuntimeError(
                        f"{name} has {text.count(old)} times {old!r}: benchmarks/paged_kv.py is out of date"
                    )
                text = text.replace(old, new)
            (sources / name).write_text(text)
        (sources / "paged.cpp").write_text(_SETTER)
        native.build_kernels(folder / "paged.so", source_folder=sources)
        self.kernels = native.Kernels(folder / "paged.so")
        self._set = self.kernels._library.xllm_set_block_table
        self._set.argtypes = [ctypes.c_void_p]

    def use_table(self, table: "Tensor") -> None:
        """table int32 [slots, blocks per slot], which the caller keeps."""
        self._set(table.data_ptr())
