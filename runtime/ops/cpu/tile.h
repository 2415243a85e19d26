// The register tile shared by the matrix products and attention, and the packing of its operands.
//
// Both operands are streams of 4-byte units along the reduction axis: one float32, or a pair of bfloat16. An operand
// of the row side is read one unit at a time and broadcast; the column side is read one vector of units at a time.
// Each output element is one accumulator that is fed in ascending order of the reduction axis, whatever the height
// of the tile: a row gives the same bits alone or in a batch.
#pragma once

#include "vec.h"

namespace xllm {

template <class T>
constexpr int kPair = 4 / sizeof(T);

template <class T>
constexpr int64_t units_of(int64_t elements) {
  return (elements + kPair<T> - 1) / kPair<T>;
}

template <class T>
struct Dot;

template <>
struct Dot<float> {
  using Operand = vf;
  // Operands of a column tile read from plain rows: one row per unit for float32, two for bfloat16.
  static XLLM_INLINE void from_rows(const float* row, const float*, Operand (&to)[kTileVecs]) {
    for (int v = 0; v < kTileVecs; ++v) to[v] = load(row + v * kLanes);
  }
  static XLLM_INLINE Operand vector(const uint32_t* p) { return load_raw<vf>(p); }
  static XLLM_INLINE Operand broadcast(const uint32_t* p) {
    float x;
    std::memcpy(&x, p, 4);
    return splat(x);
  }
  static XLLM_INLINE void store(uint32_t* p, Operand x) { store_raw(p, x); }
  static XLLM_INLINE void store_exact(uint32_t* p, Operand x) { store(p, x); }
  static XLLM_INLINE vf add(vf acc, Operand a, Operand b) { return a * b + acc; }
};

template <>
struct Dot<bf16> {
#if defined(XLLM_AVX512) && defined(__AVX512BF16__)
  using Operand = __m512bh;
  static XLLM_INLINE void from_rows(const bf16* even, const bf16* odd, Operand (&to)[kTileVecs]) {
    alignas(64) static constexpr uint16_t kOrder[64] = {
        0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
        11, 43, 12, 44, 13, 45, 14, 46, 15, 47, 16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53,
        22, 54, 23, 55, 24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63};
    const __m512i a = _mm512_loadu_si512(even), b = _mm512_loadu_si512(odd);
    to[0] = (Operand)_mm512_permutex2var_epi16(a, _mm512_load_si512(kOrder), b);
    to[1] = (Operand)_mm512_permutex2var_epi16(a, _mm512_load_si512(kOrder + 32), b);
  }
  static XLLM_INLINE Operand vector(const uint32_t* p) { return (Operand)_mm512_loadu_si512(p); }
  static XLLM_INLINE Operand broadcast(const uint32_t* p) { return (Operand)_mm512_set1_epi32(int(*p)); }
  static XLLM_INLINE void store(uint32_t* p, Operand x) { store_raw(p, x); }
  static XLLM_INLINE void store_exact(uint32_t* p, Operand x) { store(p, x); }
  // Pairs of two rows of values, rounded to nearest even.
  static XLLM_INLINE Operand pair(vf even, vf odd) {
    alignas(64) static constexpr uint16_t kOrder[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                        8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
    return (Operand)_mm512_permutexvar_epi16(_mm512_load_si512(kOrder), halves);
  }
  static XLLM_INLINE Operand exact_pair(vf even, vf odd) { return pair(even, odd); }
  static XLLM_INLINE vf add(vf acc, Operand a, Operand b) { return (vf)_mm512_dpbf16_ps((__m512)acc, a, b); }
#else
  struct Operand {
    vf even, odd;
  };
  static XLLM_INLINE void from_rows(const bf16* even, const bf16* odd, Operand (&to)[kTileVecs]) {
    for (int v = 0; v < kTileVecs; ++v) to[v] = {load(even + v * kLanes), load(odd + v * kLanes)};
  }
  static XLLM_INLINE Operand split(vu pairs) { return {as_float(pairs << 16), as_float(pairs & 0xffff0000u)}; }
  static XLLM_INLINE Operand vector(const uint32_t* p) { return split(load_raw<vu>(p)); }
  static XLLM_INLINE Operand broadcast(const uint32_t* p) { return split(vu{} + *p); }
  static XLLM_INLINE vu round(vf x) { return zero_extend(narrow(x)); }
  static XLLM_INLINE void store(uint32_t* p, Operand x) { store_raw(p, round(x.odd) << 16 | round(x.even)); }
  static XLLM_INLINE Operand pair(vf even, vf odd) { return split(round(odd) << 16 | round(even)); }
  // Of values that are bfloat16 already.
  static XLLM_INLINE void store_exact(uint32_t* p, Operand x) { store_raw(p, (vu)x.odd | (vu)x.even >> 16); }
  static XLLM_INLINE Operand exact_pair(vf even, vf odd) { return {even, odd}; }
  static XLLM_INLINE vf add(vf acc, Operand a, Operand b) { return a.odd * b.odd + (a.even * b.even + acc); }
#endif
};

// acc[r][n * kTileVecs + v] += sum over k of a[r * a_row + k * a_step] * b[n * b_block + k * b_step + v].
// meanwhile(b, k) is called at every step: a place to fetch or unpack what is multiplied later.
template <class T, int R, int NB, class Meanwhile>
XLLM_INLINE void multiply(const uint32_t* a, int64_t a_row, int64_t a_step, const uint32_t* b, int64_t b_step,
                          int64_t b_block, int64_t steps, vf (&acc)[R][NB * kTileVecs], const Meanwhile& meanwhile) {
  for (int64_t k = 0; k < steps; ++k, a += a_step, b += b_step) {
    typename Dot<T>::Operand columns[NB * kTileVecs];
#pragma GCC unroll 16
    for (int n = 0; n < NB; ++n) {
#pragma GCC unroll 16
      for (int v = 0; v < kTileVecs; ++v)
        columns[n * kTileVecs + v] = Dot<T>::vector(b + n * b_block + v * kLanes);
    }
    meanwhile(b, k);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const typename Dot<T>::Operand row = Dot<T>::broadcast(a + r * a_row);
#pragma GCC unroll 16
      for (int v = 0; v < NB * kTileVecs; ++v) acc[r][v] = Dot<T>::add(acc[r][v], row, columns[v]);
    }
  }
}
template <class T, int R, int NB>
XLLM_INLINE void multiply(const uint32_t* a, int64_t a_row, int64_t a_step, const uint32_t* b, int64_t b_step,
                          int64_t b_block, int64_t steps, vf (&acc)[R][NB * kTileVecs]) {
  multiply<T, R, NB>(a, a_row, a_step, b, b_step, b_block, steps, acc, [](const uint32_t*, int64_t) {});
}

// Sums of either kind as floats.
template <class Sum, int R, int V>
XLLM_INLINE void unrolled_copy(const Sum (&from)[R][V], vf (&to)[R][V]) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) to[r][v] = to_floats(from[r][v]);
  }
}

// Column tiles (kTileColumns) taken at once for R rows: enough independent accumulators to hide the latency of the
// multiply-adds (6 cycles on Zen 4), at most 16 of them.
template <int R>
constexpr int kWide = R <= 2 ? (kTileRows >= 8 ? 4 : 4 / R) : R <= 4 && kTileRows >= 8 ? 2 : 1;

// Rows of a tile number `tile` of `tiles` when `rows` are spread evenly: 13 rows are 7 + 6, not 12 + 1.
struct Span {
  int64_t begin, end;
};
XLLM_INLINE Span even_span(int64_t total, int64_t parts, int64_t index) {
  return {total * index / parts, total * (index + 1) / parts};
}

#if defined(XLLM_AVX512)
// 16 x 16 units in registers. kWhole drops the masks: masked stores cost several times plain ones on Zen 4.
template <bool kWhole>
XLLM_INLINE void transpose_block(const uint32_t* const* rows, int count, int64_t unit, int wide, uint32_t* dst,
                                 int64_t ld) {
  const __mmask16 row_mask = __mmask16((1u << count) - 1), unit_mask = __mmask16((1u << wide) - 1);
  __m512i r[16], t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    if (kWhole)
      r[i] = _mm512_loadu_si512(rows[i] + unit);
    else
      r[i] = i < count ? _mm512_maskz_loadu_epi32(unit_mask, rows[i] + unit) : _mm512_setzero_si512();
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
    r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
    r[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
    r[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    if (kWhole)
      _mm512_storeu_si512(dst + (unit + i) * ld, r[i]);
    else if (i < wide)
      _mm512_mask_storeu_epi32(dst + (unit + i) * ld, row_mask, r[i]);
  }
}
#endif

// [count rows][columns] -> dst[unit * ld + row]: the transpose in units, for at most 16 rows. Calls between() after
// every 16 units: a place to issue prefetches.
template <class T, class F>
XLLM_INLINE void transpose_units(const T* const* rows, int count, int64_t columns, uint32_t* dst, int64_t ld,
                                 F between) {
  const int64_t whole = columns / kPair<T>;
  int64_t u = 0;
#if defined(XLLM_AVX512)
  const uint32_t* units[16];
  for (int i = 0; i < 16; ++i) units[i] = reinterpret_cast<const uint32_t*>(rows[i < count ? i : 0]);
  if (count == 16)
    for (; u + 16 <= whole; u += 16, between()) transpose_block<true>(units, 16, u, 16, dst, ld);
  for (; u < whole; u += 16, between())
    transpose_block<false>(units, count, u, whole - u < 16 ? int(whole - u) : 16, dst, ld);
#else
  for (; u < whole; ++u) {
    for (int i = 0; i < count; ++i) std::memcpy(dst + u * ld + i, rows[i] + u * kPair<T>, 4);
    if (u % 16 == 15 || u + 1 == whole) between();
  }
#endif
  if (columns % kPair<T> != 0) {
    for (int i = 0; i < count; ++i) {
      uint32_t unit = 0;
      std::memcpy(&unit, rows[i] + whole * kPair<T>, (columns % kPair<T>) * sizeof(T));
      dst[whole * ld + i] = unit;
    }
  }
}
template <class T>
inline void transpose_units(const T* const* rows, int count, int64_t columns, uint32_t* dst, int64_t ld) {
  transpose_units(rows, count, columns, dst, ld, [] {});
}

}  // namespace xllm
