// Quantised weights as columns of a product: see quantised.py for the layouts.
//
// Codes become operands in registers, by table look-up where the CPU can: an 8-bit or 4-bit integer is exact in bfloat16,
// and its scale is left to the sums. So what is unpacked to cache and what never leaves registers is the same product.
#pragma once

#include <type_traits>

#include "gemm_tile.h"
#include "int8_codes.h"

namespace xllm {

// A step of the quantised layout is 4 bytes for each of the 32 columns of a block.
constexpr int64_t kStepBytes = 4 * kBlockColumns;

template <class T>
struct Int4Codes {
  static constexpr int kUnits = 8 / kPair<T>;
  Int4Codes() = default;
  explicit XLLM_INLINE Int4Codes(const uint8_t* from) : codes(load_raw<vu>(from)) {}
  XLLM_INLINE typename Dot<T>::Operand operand(int unit) const {
#if defined(XLLM_AVX512) && defined(__AVX512BF16__)
    if constexpr (kPair<T> == 2) {
      // -8 .. 7 twice: the look-up reads five bits, and the fifth belongs to another code.
      alignas(64) static constexpr uint16_t kValues[32] = {
          0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000,
          0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040,
          0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0};
      return (typename Dot<T>::Operand)_mm512_permutexvar_epi16((__m512i)(codes >> 4 * unit), _mm512_load_si512(kValues));
    }
#endif
    if constexpr (kPair<T> == 2)
      return Dot<T>::pair(value(4 * unit), value(16 + 4 * unit));
    else
      return value(unit / 2 * 4 + unit % 2 * 16);
  }
  // The nibble at a shift, less 8.
  XLLM_INLINE vf value(int shift) const { return to_floats((vi)(codes >> shift & 15u) - 8); }

 private:
  vu codes;
};

// Codes of all blocks of a weight; `block_bytes` lie between two.
template <class T, template <class> class Codes>
struct CodeColumns {
  static constexpr bool kIsGrouped = false, kHasZero = false;
  static constexpr int kUnits = Codes<T>::kUnits;
  const uint8_t* data;
  int64_t block_bytes;

  template <int R, int NB>
  XLLM_INLINE void multiply(const uint32_t* a, int64_t block, int64_t column, int64_t begin, int64_t end,
                            vf (&acc)[R][NB * kTileVecs]) const {
    const uint8_t* from = data + block * block_bytes + begin / kUnits * kStepBytes + 4 * column;
    int64_t unit = begin;
    for (; unit + kUnits <= end; unit += kUnits, from += kStepBytes, a += kUnits * R)
      add_step<R, NB>(a, from, kUnits, acc);
    if (unit < end) add_step<R, NB>(a, from, int(end - unit), acc);
  }

  // `units` units of a block, from unit `begin` on, in the layout of packed weights; whole steps are written.
  XLLM_INLINE void unpack(int64_t block, int64_t begin, int64_t units, uint32_t* to) const {
    const uint8_t* from = data + block * block_bytes + begin / kUnits * kStepBytes;
    for (int64_t done = 0; done < units; done += kUnits, from += kStepBytes, to += kUnits * kBlockColumns) {
      prefetch(from, kBlockColumns);
      for (int64_t column = 0; column < kBlockColumns; column += kLanes) {
        const Codes<T> codes(from + 4 * column);
#pragma GCC unroll 16
        for (int unit = 0; unit < kUnits; ++unit)
          Dot<T>::store(to + unit * kBlockColumns + column, codes.operand(unit));
      }
    }
  }

  // Blocks [begin, end) whole.
  StoredColumns<T> unpacked(int64_t begin, int64_t end, int64_t units, uint32_t* to) const {
    const int64_t stride = units * kBlockColumns + kUnpackSlack;
    for (int64_t block = begin; block < end; ++block) unpack(block, 0, units, to + (block - begin) * stride);
    return {to, stride, begin};
  }

 private:
  static XLLM_INLINE void prefetch(const uint8_t* from, int64_t columns) {
    for (int64_t line = 0; line < 4 * columns; line += 64) __builtin_prefetch(from + 48 * kStepBytes + line);
  }

  template <int R, int NB>
  XLLM_INLINE void add_step(const uint32_t* a, const uint8_t* from, int units, vf (&acc)[R][NB * kTileVecs]) const {
    Codes<T> codes[NB * kTileVecs];
#pragma GCC unroll 16
    for (int n = 0; n < NB; ++n) {
#pragma GCC unroll 16
      for (int v = 0; v < kTileVecs; ++v)
        codes[n * kTileVecs + v] = Codes<T>(from + n * block_bytes + 4 * v * kLanes);
      prefetch(from + n * block_bytes, kTileColumns);
    }
#pragma GCC unroll 16
    for (int unit = 0; unit < kUnits; ++unit) {
      if (unit >= units) break;
      typename Dot<T>::Operand columns[NB * kTileVecs];
#pragma GCC unroll 16
      for (int v = 0; v < NB * kTileVecs; ++v) columns[v] = codes[v].operand(unit);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const typename Dot<T>::Operand row = Dot<T>::broadcast(a + unit * R + r);
#pragma GCC unroll 16
        for (int v = 0; v < NB * kTileVecs; ++v) acc[r][v] = Dot<T>::add(acc[r][v], row, columns[v]);
      }
    }
  }
};

// Columns whose sums are scaled group by group: the codes mean (code - zero) * scale. With zero points scales are
// float32, see quantised.py.
template <class Columns, bool kZero>
struct GroupedColumns : Columns {
  static constexpr bool kIsGrouped = true, kHasZero = kZero;
  using Scale = std::conditional_t<kZero, float, bf16>;
  const Scale* scales;
  // Null without zero points.
  const bf16* zeros;
  // Between two blocks, of both.
  int64_t block_scales;
  int64_t units;
  int64_t group_units() const { return units; }
  XLLM_INLINE vf scale(int64_t block, int64_t group, int64_t column) const {
    return load(scales + block * block_scales + group * kBlockColumns + column);
  }
  XLLM_INLINE vf zero(int64_t block, int64_t group, int64_t column) const {
    return load(zeros + block * block_scales + group * kBlockColumns + column);
  }
};

template <class T>
struct Int8Weight {
  static constexpr bool kIsStored = false;
  CodeColumns<T, Int8Codes> codes;
  const auto& columns() const { return codes; }
  StoredColumns<T> unpacked(int64_t begin, int64_t end, int64_t units, uint32_t* to) const {
    return codes.unpacked(begin, end, units, to);
  }
  // The values themselves: the scale is left to the sums.
  const uint32_t* panel(int64_t block, int64_t unit, int64_t units, uint32_t* to) const {
    codes.unpack(block, unit, units, to);
    return to;
  }
};

template <class T, bool kHasZero>
struct Int4Weight {
  static constexpr bool kIsStored = false;
  GroupedColumns<CodeColumns<T, Int4Codes>, kHasZero> codes;
  using Scale = typename decltype(codes)::Scale;
  const auto& columns() const { return codes; }
  GroupedColumns<StoredColumns<T>, kHasZero> unpacked(int64_t begin, int64_t end, int64_t units, uint32_t* to) const {
    return {codes.unpacked(begin, end, units, to), codes.scales, codes.zeros, codes.block_scales, codes.units};
  }
  // (value - zero) * scale, rounded to T: AMX tiles keep the whole reduction axis in one sum.
  const uint32_t* panel(int64_t block, int64_t unit, int64_t units, uint32_t* to) const {
    constexpr int kUnits = Int4Codes<T>::kUnits;
    const uint8_t* from = codes.data + block * codes.block_bytes + unit / kUnits * kStepBytes;
    uint32_t* out = to;
    for (int64_t done = unit; done < unit + units; done += kUnits, from += kStepBytes, out += kUnits * kBlockColumns) {
      const int64_t group = done / codes.units;
      for (int64_t column = 0; column < kBlockColumns; column += kLanes) {
        const Int4Codes<T> step(from + 4 * column);
        const vf scale = codes.scale(block, group, column);
        vf zero{};
        if constexpr (kHasZero) zero = codes.zero(block, group, column);
        for (int pair = 0; pair < kUnits; ++pair)
          Dot<T>::store(out + pair * kBlockColumns + column,
                        Dot<T>::pair((step.value(4 * pair) - zero) * scale, (step.value(16 + 4 * pair) - zero) * scale));
      }
    }
    return to;
  }
};

}  // namespace xllm
