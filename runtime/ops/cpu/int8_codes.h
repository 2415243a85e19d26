// int8 codes as operands of a product, and rows rounded to codes.
//
// An 8-bit integer is exact in bfloat16, so codes become operands in registers, by table look-up where the CPU can, and
// their scale is left to the sums.
#pragma once

#include <algorithm>

#include "tile.h"

namespace xllm {

// The first n <= kLanes codes of a row as floats, zeros after them.
XLLM_INLINE vf widen_codes(const int8_t* p, int64_t n) {
  int8_t part[kLanes] = {};
  if (n < kLanes) {
    std::memcpy(part, p, size_t(n));
    p = part;
  }
#if defined(XLLM_AVX512)
  return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__)
  return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  vf values;
  for (int i = 0; i < kLanes; ++i) values[i] = float(p[i]);
  return values;
#endif
}

// kLanes columns of 4 codes along the reduction axis; operand(unit) is one of their kUnits units.
template <class T>
struct Int8Codes {
  static constexpr int kUnits = 4 / kPair<T>;
  static constexpr bool kIsDirect = false, kHasUnits = false;
  Int8Codes() = default;
  explicit XLLM_INLINE Int8Codes(const uint8_t* from) : codes(load_raw<vi>(from)) {}
  XLLM_INLINE typename Dot<T>::Operand operand(int unit) const {
    if constexpr (kPair<T> == 2)
      return Dot<T>::exact_pair(element(2 * unit), element(2 * unit + 1));
    else
      return element(unit);
  }

 private:
  XLLM_INLINE vf element(int index) const { return to_floats(codes << (24 - 8 * index) >> 24); }
  vi codes;
};

// Operands of a column tile read from rows of codes, as Dot<T>::from_rows reads them from rows of T.
template <class T>
XLLM_INLINE void operands_from_codes(const int8_t* even, const int8_t* odd,
                                     typename Dot<T>::Operand (&to)[kTileVecs]) {
  for (int v = 0; v < kTileVecs; ++v) {
    const vf first = widen_codes(even + v * kLanes, kLanes);
    if constexpr (kPair<T> == 2)
      to[v] = Dot<T>::exact_pair(first, widen_codes(odd + v * kLanes, kLanes));
    else
      to[v] = first;
  }
}

#if defined(XLLM_AVX512) && defined(__AVX512BF16__) && defined(__AVX512VBMI__)
// The two bytes of a magnitude in bfloat16.
struct MagnitudeBytes {
  alignas(64) uint8_t low[128] = {}, high[128] = {};
  constexpr MagnitudeBytes() {
    for (int magnitude = 1; magnitude < 128; ++magnitude) {
      int exponent = 0;
      while (magnitude >> (exponent + 1)) ++exponent;
      const int bits = (127 + exponent) << 7 | ((magnitude << 7 >> exponent) & 127);
      low[magnitude] = uint8_t(bits & 255);
      high[magnitude] = uint8_t(bits >> 8);
    }
  }
};

// 64 codes in bfloat16: the low bytes and the high bytes.
struct CodeBytes {
  __m512i low, high;
  CodeBytes() = default;
  explicit XLLM_INLINE CodeBytes(__m512i codes) {
    static constexpr MagnitudeBytes kBytes;
    const __m512i magnitude = _mm512_abs_epi8(codes);
    low = look_up(kBytes.low, magnitude);
    // x & 0x80 | y
    high = _mm512_ternarylogic_epi32(codes, _mm512_set1_epi8(char(0x80)), look_up(kBytes.high, magnitude), 0xea);
    // The magnitude of -128 is past the table.
    __m512i smallest = _mm512_set1_epi8(char(0xc3));
    // Kept in a register: the compiler would broadcast it from a general one each time. Measured for one row with
    // weights in cache: 1.04 to 1.1 of the rate.
    asm("" : "+v"(smallest));
    high = _mm512_mask_mov_epi8(high, _mm512_movepi8_mask(magnitude), smallest);
  }
  // `order`: for each byte of the operand its index in low, or 64 more for one in high.
  XLLM_INLINE Dot<bf16>::Operand operand(const uint8_t* order) const {
    return (Dot<bf16>::Operand)_mm512_permutex2var_epi8(low, _mm512_load_si512(order), high);
  }

 private:
  static XLLM_INLINE __m512i look_up(const uint8_t* table, __m512i index) {
    return _mm512_permutex2var_epi8(_mm512_load_si512(table), index, _mm512_load_si512(table + 64));
  }
};

// Of a step: low and high byte of the elements of a pair.
struct StepOrder {
  alignas(64) uint8_t of_unit[2][64] = {};
  constexpr StepOrder() {
    for (int unit = 0; unit < 2; ++unit)
      for (int byte = 0; byte < 64; ++byte)
        of_unit[unit][byte] = uint8_t(byte / 4 * 4 + 2 * unit + byte % 4 / 2 + byte % 2 * 64);
  }
};

template <>
struct Int8Codes<bf16> {
  static constexpr int kUnits = 2;
  // Several look-ups for each operand of a dot product, which pay once for all row tiles.
  static constexpr bool kIsDirect = false, kHasUnits = false;
  Int8Codes() = default;
  explicit XLLM_INLINE Int8Codes(const uint8_t* from) : codes(_mm512_loadu_si512(from)) {}
  XLLM_INLINE Dot<bf16>::Operand operand(int unit) const {
    static constexpr StepOrder kOrder;
    return codes.operand(kOrder.of_unit[unit]);
  }

 private:
  CodeBytes codes;
};

// Of 32 codes of an even row with 32 of an odd one behind them: pairs of the two.
struct RowOrder {
  alignas(64) uint8_t of_vector[2][64] = {};
  constexpr RowOrder() {
    for (int vector = 0; vector < 2; ++vector)
      for (int byte = 0; byte < 64; ++byte)
        of_vector[vector][byte] = uint8_t(16 * vector + byte / 4 + byte % 4 / 2 * 32 + byte % 2 * 64);
  }
};
template <>
XLLM_INLINE void operands_from_codes<bf16>(const int8_t* even, const int8_t* odd,
                                           Dot<bf16>::Operand (&to)[kTileVecs]) {
  static constexpr RowOrder kOrder;
  const __m256i first = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(even));
  const __m256i second = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(odd));
  const CodeBytes codes(_mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1));
  for (int v = 0; v < kTileVecs; ++v) to[v] = codes.operand(kOrder.of_vector[v]);
}
#endif

// Rounds a row to codes of at most 127 in magnitude and returns their scale. A NaN or an infinity makes the scale, and
// with it all that the row means, NaN or infinite.
template <class T>
float round_row(const T* x, int64_t width, int8_t* to) {
  // Magnitudes order like their bits; NaN above all.
  uint32_t bits = 0;
  for (int64_t i = 0; i < width; ++i) {
    const float value = to_float(x[i]);
    uint32_t magnitude;
    std::memcpy(&magnitude, &value, 4);
    bits = std::max(bits, magnitude & 0x7fffffffu);
  }
  float largest;
  std::memcpy(&largest, &bits, 4);
  const bool is_finite = bits < 0x7f800000u;
  const float inverse = largest > 0 && is_finite ? std::min(127.0f / largest, 3e38f) : 0.0f;
  // An infinite or NaN element would have no integer.
  if (is_finite)
    for (int64_t i = 0; i < width; ++i) to[i] = int8_t(int32_t(__builtin_rintf(to_float(x[i]) * inverse)));
  else
    std::memset(to, 0, size_t(width));
  return largest / 127.0f;
}

}  // namespace xllm
