// Rows of bfloat16 as fixed-point numbers, for the product of one row with int4 weights.
//
// Each group of inputs that shares a scale has a unit, a power of two, and its elements are multiples of it: exactly from
// 1/128 of the largest magnitude on, rounded by up to half a unit below. bfloat16 itself rounds the largest by up to 128
// times that. Sums of a group are integers that float32 holds, so they are the same bits in any order and in either kind
// of dot product: of bfloat16, for many rows, or of the two bytes of each element, for which codes need no look-up. One
// row takes 0.75 of the time so, two as long as before; both measured with weights in cache.
#pragma once

#include <algorithm>

#include "amx.h"
#include "vec.h"

namespace xllm {

// AMX tiles keep one sum for all groups, and without dot products of bytes nothing is gained.
#if defined(XLLM_AVX512) && defined(__AVX512BF16__) && defined(__AVX512VNNI__) && !defined(XLLM_AMX)
#define XLLM_FIXED_ROWS 1
constexpr bool kHasFixedRows = true;
#else
constexpr bool kHasFixedRows = false;
#endif

// Magnitudes are below 2^15 units and those of codes at most 8: the sums of longer groups could pass 2^24.
constexpr int kFixedBits = 15;
constexpr int64_t kMostFixedGroup = 64;

#if defined(XLLM_FIXED_ROWS)
// The unit of a group and its inverse; NaN and 0 where the group has a NaN or an infinity.
struct FixedUnit {
  float unit, inverse;
  FixedUnit(const bf16* x, int64_t group) {
    // Magnitudes order like their bits; NaN above all.
    vu magnitudes{};
    for (int64_t i = 0; i < group; i += kLanes) {
      const vu bits = as_bits(load_n(x + i, std::min<int64_t>(kLanes, group - i))) & 0x7fffffffu;
      magnitudes = bits > magnitudes ? bits : magnitudes;
    }
    const uint32_t largest = _mm512_reduce_max_epu32((__m512i)magnitudes);
    // One more for a significand of 255, whose high byte would be 128.
    const int exponent = int(largest >> 23) + ((largest >> 16 & 127) == 127) - 127 + 1 - kFixedBits;
    if (largest >= 0x7f800000u) {
      unit = __builtin_nanf("");
      inverse = 0;
    } else if (exponent < -126) {
      // Dot products of bfloat16 take denormal numbers for zeros.
      unit = 1;
      inverse = 0;
    } else {
      unit = power(exponent);
      inverse = power(-exponent);
    }
  }

 private:
  static float power(int exponent) {
    const uint32_t bits = uint32_t(exponent + 127) << 23;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  }
};

// The row as multiples of its groups' units; `group` divides `width`.
inline void round_to_units(const bf16* x, int64_t width, int64_t group, bf16* to) {
  // 1.5 * 2^23: adding it rounds to an integer.
  const vf magic = splat(12582912.0f);
  for (int64_t begin = 0; begin < width; begin += group) {
    const FixedUnit fixed(x + begin, group);
    for (int64_t i = begin; i < begin + group; i += kLanes) {
      const int64_t count = std::min<int64_t>(kLanes, begin + group - i);
      store_n(to + i, (load_n(x + i, count) * fixed.inverse + magic - magic) * fixed.unit, count);
    }
  }
}

// The row as bytes with a sign: of each 8 elements the high bytes, which count 256 units, then the low ones, each in the
// order of Int4Bytes. Also the units of the groups, and what their sums begin with: -offset times the elements' sum.
inline void split_row(const bf16* x, int64_t width, int64_t group, int32_t offset, uint8_t* to, float* units,
                      int32_t* begins) {
  const __m128i order = _mm_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
  for (int64_t begin = 0; begin < width; begin += group, x += group) {
    const FixedUnit fixed(x, group);
    vi sums{};
    for (int64_t i = 0; i < group; i += kLanes) {
      const int64_t count = std::min<int64_t>(kLanes, group - i);
      const vi numbers = (vi)_mm512_cvtps_epi32((__m512)(load_n(x + i, count) * fixed.inverse));
      sums += numbers;
      const __m128i high = _mm512_cvtepi32_epi8((__m512i)((numbers + 128) >> 8));
      const __m128i low = _mm512_cvtepi32_epi8((__m512i)numbers);
      for (int64_t eight = 0; eight < count; eight += 8, to += 16) {
        const __m128i both = eight == 0 ? _mm_unpacklo_epi64(high, low) : _mm_unpackhi_epi64(high, low);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_shuffle_epi8(both, order));
      }
    }
    *units++ = fixed.unit;
    *begins++ = -offset * _mm512_reduce_add_epi32((__m512i)sums);
  }
}
#endif

}  // namespace xllm
