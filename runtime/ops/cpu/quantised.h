// Quantised weights as columns of a product: see quantised.py for the layouts.
//
// Codes become operands in registers, by table look-up where the CPU can: an 8-bit or 4-bit integer is exact in
// bfloat16, and its scale is left to the sums. So what is unpacked to cache and what never leaves registers is the same
// product.
#pragma once

#include <type_traits>

#include "gemm_tile.h"
#include "int8_codes.h"

namespace xllm {

template <class T>
struct Int4Codes {
  static constexpr int kUnits = 8 / kPair<T>;
  static constexpr bool kHasUnits = kHasFixedRows && kPair<T> == 2;
#if defined(XLLM_AVX512) && defined(__AVX512BF16__)
  // One look-up for each dot product's operand, which costs less than to store and load it.
  static constexpr bool kIsDirect = kPair<T> == 2;
#else
  static constexpr bool kIsDirect = false;
#endif
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
      return Dot<T>::exact_pair(value(4 * unit), value(16 + 4 * unit));
    else
      return value(unit / 2 * 4 + unit % 2 * 16);
  }
  // The nibble at a shift, less 8.
  XLLM_INLINE vf value(int shift) const { return to_floats((vi)(codes >> shift & 15u) - 8); }

 private:
  vu codes;
};

// Codes of all blocks of a weight; `stride` bytes lie between two.
template <class T, template <class> class Codes>
struct CodeColumns {
  static constexpr bool kIsStored = false, kIsDirect = Codes<T>::kIsDirect, kIsGrouped = false, kHasZero = false;
  static constexpr bool kIsRounded = false, kIsFixed = false, kHasUnits = Codes<T>::kHasUnits;
  static constexpr int kMostRows = kIsDirect ? kTileRows : kTileRows / 2;
  static constexpr int64_t kUnits = Codes<T>::kUnits;
  const uint8_t* data;
  int64_t stride;
  int64_t block_bytes() const { return stride; }
  const uint8_t* step(int64_t block, int64_t unit) const { return data + block * stride + unit / kUnits * kStepBytes; }

  template <int R, int N, class Work>
  XLLM_INLINE void multiply(const uint32_t* a, int64_t block, int64_t column, int64_t begin, int64_t end, Work work,
                            vf (&acc)[R][N * kTileVecs]) const {
    const uint8_t* from = step(block, begin) + 4 * column;
    for (int64_t unit = begin; unit < end; unit += kUnits, from += kStepBytes, a += kUnits * R) {
      work(from, unit, column);
      // Tile by tile: the codes of all would not stay in registers.
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) {
        if (unit + kUnits <= end)
          add_step<R, N>(a, from, kUnits, n, acc);
        else
          add_step<R, N>(a, from, int(end - unit), n, acc);
      }
    }
  }

  // `units` units of a block, from unit `begin` on, in the layout of packed weights; whole steps are written.
  XLLM_INLINE void unpack(int64_t block, int64_t begin, int64_t units, uint32_t* to) const {
    const uint8_t* from = step(block, begin);
    for (int64_t done = 0; done < units; done += kUnits, from += kStepBytes, to += kUnits * kBlockColumns) {
      for (int64_t line = 0; line < kStepBytes; line += 64) __builtin_prefetch(from + 48 * kStepBytes + line);
      for (int64_t column = 0; column < kBlockColumns; column += kLanes) unpack_vector(from + 4 * column, to + column);
    }
  }
  // kLanes columns of a step.
  static XLLM_INLINE void unpack_vector(const uint8_t* from, uint32_t* to) {
    const Codes<T> codes(from);
#pragma GCC unroll 16
    for (int unit = 0; unit < kUnits; ++unit) Dot<T>::store_exact(to + unit * kBlockColumns, codes.operand(unit));
  }

 private:
  template <int R, int N>
  static XLLM_INLINE void add_step(const uint32_t* a, const uint8_t* from, int units, int n,
                                   vf (&acc)[R][N * kTileVecs]) {
    Codes<T> codes[kTileVecs];
#pragma GCC unroll 16
    for (int v = 0; v < kTileVecs; ++v) codes[v] = Codes<T>(from + 4 * (n * kTileColumns + v * kLanes));
#pragma GCC unroll 16
    for (int unit = 0; unit < kUnits; ++unit) {
      if (unit >= units) break;
      typename Dot<T>::Operand columns[kTileVecs];
#pragma GCC unroll 16
      for (int v = 0; v < kTileVecs; ++v) columns[v] = codes[v].operand(unit);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const typename Dot<T>::Operand row = Dot<T>::broadcast(a + unit * R + r);
#pragma GCC unroll 16
        for (int v = 0; v < kTileVecs; ++v) {
          vf& sum = acc[r][n * kTileVecs + v];
          sum = Dot<T>::add(sum, row, columns[v]);
        }
      }
    }
  }
};

// Unpacks a block while another is multiplied: one vector of codes every few units, in execution units and registers
// that the products leave.
template <class Columns>
struct Unpacker {
  Columns codes;
  int64_t block;
  // Block whose codes are fetched meanwhile; a wrong guess costs time only.
  int64_t later;
  uint32_t* to;
  XLLM_INLINE void operator()(const void*, int64_t unit, int64_t column) const {
    constexpr int64_t kEvery = Columns::kUnits / kTileVecs;
    if (unit % kEvery != 0) return;
    const int64_t at = column + unit / kEvery % kTileVecs * kLanes;
    const uint8_t* from = codes.step(block, unit) + 4 * at;
    __builtin_prefetch(from + (later - block) * codes.stride, 0, 2);
    Columns::unpack_vector(from, to + unit / Columns::kUnits * Columns::kUnits * kBlockColumns + at);
  }
  // The last step where it is not a whole one.
  void finish(int64_t units) const {
    const int64_t rest = units % Columns::kUnits;
    if (rest > 0) codes.unpack(block, units - rest, rest, to + (units - rest) * kBlockColumns);
  }
};

// Codes of all blocks, as `Bytes` makes operands of them for rounded rows: never in more than registers.
template <class Bytes>
struct RoundedColumns {
  static constexpr bool kIsStored = false, kIsDirect = true, kIsGrouped = false, kHasZero = false, kIsRounded = true;
  static constexpr bool kIsFixed = false, kHasUnits = false;
  static constexpr bool kIsInterleaved = Bytes::kIsInterleaved;
  static constexpr int kMostRows = kTileRows;
  static constexpr int64_t kUnits = Bytes::kUnits;
  static constexpr int32_t kOffset = Bytes::kOffset;
  const uint8_t* data;
  int64_t stride;
  int64_t block_bytes() const { return stride; }

  template <int R, int N, class Work>
  XLLM_INLINE void multiply(const uint32_t* a, int64_t block, int64_t column, int64_t begin, int64_t end, Work work,
                            vi (&acc)[R][N * kTileVecs]) const {
    static_assert(N == 1);
    const uint8_t* from = data + block * stride + begin / kUnits * kStepBytes + 4 * column;
    for (int64_t unit = begin; unit < end; unit += kUnits, from += kStepBytes, a += kUnits * R) {
      work(from, unit, column);
      Bytes codes[kTileVecs];
#pragma GCC unroll 16
      for (int v = 0; v < kTileVecs; ++v) codes[v] = Bytes(from + 4 * v * kLanes);
#pragma GCC unroll 16
      for (int part = 0; part < kUnits; ++part) {
        vu columns[kTileVecs];
#pragma GCC unroll 16
        for (int v = 0; v < kTileVecs; ++v) columns[v] = codes[v].operand(part);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          const vu row = vu{} + a[part * R + r];
#pragma GCC unroll 16
          for (int v = 0; v < kTileVecs; ++v) acc[r][v] = add_quads<Bytes::kBits>(acc[r][v], columns[v], row);
        }
      }
    }
  }
};

// Codes of int4 for one row of fixed-point numbers: of each step the units are the row's high bytes, then the low ones,
// as split_row() makes them.
struct FixedColumns {
  static constexpr bool kIsStored = false, kIsDirect = true, kIsGrouped = false, kHasZero = false, kIsRounded = true;
  static constexpr bool kIsFixed = true, kHasUnits = false;
  static constexpr int kMostRows = 1;
  static constexpr int64_t kUnits = 4;
  static constexpr int32_t kOffset = Int4Bytes::kOffset;
  const uint8_t* data;
  int64_t stride;
  int64_t block_bytes() const { return stride; }

  template <int R, int N, class Work>
  XLLM_INLINE void multiply(const uint32_t* a, int64_t block, int64_t column, int64_t begin, int64_t end, Work work,
                            vi (&acc)[R][N * kTileVecs]) const {
    static_assert(R == 1 && N == 1);
    const uint8_t* from = data + block * stride + begin / kUnits * kStepBytes + 4 * column;
    vi high[kTileVecs] = {};
    for (int64_t unit = begin; unit < end; unit += kUnits, from += kStepBytes, a += kUnits) {
      work(from, unit, column);
#pragma GCC unroll 16
      for (int v = 0; v < kTileVecs; ++v) {
        const Int4Bytes codes(from + 4 * v * kLanes);
#pragma GCC unroll 16
        for (int part = 0; part < Int4Bytes::kUnits; ++part) {
          const vu columns = codes.operand(part);
          high[v] = add_quads<Int4Bytes::kBits>(high[v], columns, vu{} + a[part]);
          acc[0][v] = add_quads<Int4Bytes::kBits>(acc[0][v], columns, vu{} + a[Int4Bytes::kUnits + part]);
        }
      }
    }
#pragma GCC unroll 16
    for (int v = 0; v < kTileVecs; ++v) acc[0][v] += high[v] << 8;
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
  // Of the 32 columns of a block.
  XLLM_INLINE void fetch_scales(int64_t block, int64_t group) const {
    const int64_t at = block * block_scales + group * kBlockColumns;
    for (size_t line = 0; line < kBlockColumns * sizeof(Scale); line += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(scales + at) + line, 0, 2);
    if (kZero) __builtin_prefetch(zeros + at, 0, 2);
  }
  XLLM_INLINE vf scale(int64_t block, int64_t group, int64_t column) const {
    return load(scales + block * block_scales + group * kBlockColumns + column);
  }
  XLLM_INLINE vf zero(int64_t block, int64_t group, int64_t column) const {
    return load(zeros + block * block_scales + group * kBlockColumns + column);
  }
};

// Beside columns() and panel(), see gemm.h, a weight makes an unpacker, and columns of one block that is unpacked at
// `data`.
template <class T>
struct Int8Weight {
  static constexpr bool kIsStored = false;
  using Codes = CodeColumns<T, Int8Codes>;
  Codes codes;
  const Codes& columns() const { return codes; }
  StoredColumns<T> unpacked(int64_t block, const uint32_t* data) const { return {data, 0, block}; }
  Unpacker<Codes> unpacker(int64_t block, int64_t later, uint32_t* to) const { return {codes, block, later, to}; }
  // The values themselves: the scale is left to the sums.
  const uint32_t* panel(int64_t block, int64_t unit, int64_t units, uint32_t* to) const {
    codes.unpack(block, unit, units, to);
    return to;
  }
};

// Codes whose groups have scales of their own.
template <class T, template <class> class CodesOf, bool kHasZero>
struct GroupedWeight {
  static constexpr bool kIsStored = false;
  using Codes = CodeColumns<T, CodesOf>;
  GroupedColumns<Codes, kHasZero> codes;
  using Scale = typename decltype(codes)::Scale;
  const auto& columns() const { return codes; }
  GroupedColumns<StoredColumns<T>, kHasZero> unpacked(int64_t block, const uint32_t* data) const {
    return {{data, 0, block}, codes.scales, codes.zeros, codes.block_scales, codes.units};
  }
  Unpacker<Codes> unpacker(int64_t block, int64_t later, uint32_t* to) const { return {codes, block, later, to}; }
  // (value - zero) * scale, rounded to T: AMX tiles keep the whole reduction axis in one sum.
  const uint32_t* panel(int64_t block, int64_t unit, int64_t units, uint32_t* to) const {
    constexpr int64_t kUnits = Codes::kUnits;
    const uint8_t* from = codes.step(block, unit);
    uint32_t* out = to;
    for (int64_t done = unit; done < unit + units; done += kUnits, from += kStepBytes, out += kUnits * kBlockColumns) {
      const int64_t group = done / codes.units;
      for (int64_t column = 0; column < kBlockColumns; column += kLanes) {
        const CodesOf<float> step(from + 4 * column);
        const vf scale = codes.scale(block, group, column);
        vf zero{};
        if constexpr (kHasZero) zero = codes.zero(block, group, column);
        for (int pair = 0; pair < kUnits; ++pair)
          Dot<T>::store(out + pair * kBlockColumns + column,
                        Dot<T>::pair((step.operand(2 * pair) - zero) * scale, (step.operand(2 * pair + 1) - zero) * scale));
      }
    }
    return to;
  }
};

// Multiplied with rounded rows; register kernels only.
template <class Columns>
struct RoundedWeight {
  static constexpr bool kIsStored = false;
  Columns codes;
  const Columns& columns() const { return codes; }
};

}  // namespace xllm
