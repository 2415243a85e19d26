// Quantised weights as panels of packed ones: see quantised.py for the layouts.
#pragma once

#include <type_traits>

#include "gemm.h"

namespace xllm {

// A step of the quantised layout is 4 bytes for each of the 32 columns of a block.
constexpr int64_t kStepBytes = 4 * kBlockColumns;

// Two rows of the operands of a column vector as one: pairs of bfloat16, rounded to nearest even.
XLLM_INLINE vu pair_bits(vf even, vf odd) {
#if defined(XLLM_AVX512) && defined(__AVX512BF16__)
  alignas(64) static constexpr uint16_t kOrder[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
  return (vu)_mm512_permutexvar_epi16(_mm512_load_si512(kOrder), halves);
#else
  return zero_extend(narrow(odd)) << 16 | zero_extend(narrow(even));
#endif
}

// Two consecutive elements of the reduction axis to the units of T: one pair, or two rows of float32.
template <class T>
XLLM_INLINE void store_elements(vf even, vf odd, uint32_t* to) {
  if constexpr (kPair<T> == 2) {
    store_raw(to, pair_bits(even, odd));
  } else {
    store_raw(to, even);
    store_raw(to + kBlockColumns, odd);
  }
}

template <class T>
struct Int8Weight {
  static constexpr bool kIsStored = false;
  const uint8_t* data;
  int64_t block_bytes;
  // The values themselves: they are exact in T, and the scale is left to the sums.
  const uint32_t* panel(int64_t block, int64_t unit, int64_t units, uint32_t* to) const {
    constexpr int64_t kUnits = 4 / kPair<T>;
    const uint8_t* from = data + block * block_bytes + unit / kUnits * kStepBytes;
    for (int64_t done = 0; done < units; done += kUnits, from += kStepBytes, to += kUnits * kBlockColumns) {
      __builtin_prefetch(from + 16 * kStepBytes);
      __builtin_prefetch(from + 16 * kStepBytes + 64);
      for (int64_t column = 0; column < kBlockColumns; column += kLanes) {
        const vi quad = load_raw<vi>(from + 4 * column);
        const vf first = __builtin_convertvector(quad << 24 >> 24, vf);
        const vf second = __builtin_convertvector(quad << 16 >> 24, vf);
        const vf third = __builtin_convertvector(quad << 8 >> 24, vf);
        const vf fourth = __builtin_convertvector(quad >> 24, vf);
        store_elements<T>(first, second, to + column);
        store_elements<T>(third, fourth, to + kUnits / 2 * kBlockColumns + column);
      }
    }
    return to - (units + kUnits - 1) / kUnits * kUnits * kBlockColumns;
  }
};

// With zero points scales are float32: see quantised.py.
template <class T, bool kHasZero>
struct Int4Weight {
  static constexpr bool kIsStored = false;
  using Scale = std::conditional_t<kHasZero, float, bf16>;
  const uint8_t* data;
  int64_t block_bytes;
  const Scale* scale;
  int64_t block_scales;
  // Where there are, as far apart as the scales.
  const bf16* zero;
  // Elements that share a scale, a multiple of 8.
  int64_t group;
  // (value - zero) * scale, rounded to T.
  const uint32_t* panel(int64_t block, int64_t unit, int64_t units, uint32_t* to) const {
    constexpr int64_t kUnits = 8 / kPair<T>;
    constexpr int64_t kVectors = kBlockColumns / kLanes;
    const int64_t group_units = group / kPair<T>;
    const uint8_t* from = data + block * block_bytes + unit / kUnits * kStepBytes;
    uint32_t* out = to;
    vf scales[kVectors], zeros[kVectors] = {};
    for (int64_t done = unit; done < unit + units; done += kUnits, from += kStepBytes, out += kUnits * kBlockColumns) {
      __builtin_prefetch(from + 16 * kStepBytes);
      __builtin_prefetch(from + 16 * kStepBytes + 64);
      if (done == unit || done % group_units == 0)
        for (int64_t v = 0; v < kVectors; ++v) {
          const int64_t at = block * block_scales + done / group_units * kBlockColumns + v * kLanes;
          scales[v] = load(scale + at);
          if constexpr (kHasZero) zeros[v] = load(zero + at);
        }
      for (int64_t v = 0; v < kVectors; ++v) {
        const vu codes = load_raw<vu>(from + 4 * v * kLanes);
#pragma GCC unroll 4
        for (int pair = 0; pair < 4; ++pair)
          store_elements<T>(weight(codes >> 4 * pair, scales[v], zeros[v]),
                            weight(codes >> (16 + 4 * pair), scales[v], zeros[v]),
                            out + pair * (2 / kPair<T>)*kBlockColumns + v * kLanes);
      }
    }
    return to;
  }

 private:
  static XLLM_INLINE vf weight(vu codes, vf scale, vf zero) {
    if constexpr (kHasZero) return (value(codes) - zero) * scale;
    return value(codes) * scale;
  }
  // The lowest nibble of each lane, less 8.
  static XLLM_INLINE vf value(vu codes) {
#if defined(XLLM_AVX512)
    const __m512 values = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    return (vf)_mm512_permutexvar_ps((__m512i)codes, values);
#else
    return __builtin_convertvector((vi)(codes & 15u) - 8, vf);
#endif
  }
};

}  // namespace xllm
