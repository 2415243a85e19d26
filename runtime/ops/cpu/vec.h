// Vector types and element conversions for every instruction set the kernels are built for.
//
// Written with GCC/Clang vector extensions, so one source serves AVX-512, AVX2 and anything else; the few
// operations the extensions cannot express (bf16 dot products, hardware rounding) are selected by feature macros.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define XLLM_INLINE inline __attribute__((always_inline))

namespace xllm {

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define XLLM_AVX512 1
constexpr int kLanes = 16;
// 12 rows x 2 vectors of accumulators leave 8 of 32 registers for the operands.
constexpr int kTileRows = 12;
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int kLanes = 8;
constexpr int kTileRows = 6;
#else
constexpr int kLanes = 4;
constexpr int kTileRows = 6;
#endif
constexpr int kTileVecs = 2;
constexpr int kTileColumns = kTileVecs * kLanes;

typedef float vf __attribute__((vector_size(4 * kLanes)));
typedef int32_t vi __attribute__((vector_size(4 * kLanes)));
typedef uint32_t vu __attribute__((vector_size(4 * kLanes)));
typedef uint16_t vh __attribute__((vector_size(2 * kLanes)));

struct bf16 {
  uint16_t bits;
};

// memcpy is the portable unaligned load; it compiles to one instruction.
template <class V, class P>
XLLM_INLINE V load_raw(const P* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}
template <class V, class P>
XLLM_INLINE void store_raw(P* p, V v) {
  std::memcpy(p, &v, sizeof(V));
}
XLLM_INLINE vf splat(float x) { return x - vf{}; }
XLLM_INLINE vf as_float(vu v) { return (vf)v; }
XLLM_INLINE vu as_bits(vf v) { return (vu)v; }

// GCC 12 splits __builtin_convertvector of these widths into halves; the intrinsics are one instruction.
XLLM_INLINE vu zero_extend(vh v) {
#if defined(XLLM_AVX512)
  return (vu)_mm512_cvtepu16_epi32((__m256i)v);
#elif defined(__AVX2__)
  return (vu)_mm256_cvtepu16_epi32((__m128i)v);
#else
  return __builtin_convertvector(v, vu);
#endif
}
XLLM_INLINE vh truncate(vu v) {
#if defined(XLLM_AVX512)
  return (vh)_mm512_cvtepi32_epi16((__m512i)v);
#else
  return __builtin_convertvector(v, vh);
#endif
}

XLLM_INLINE vf to_floats(vi v) {
#if defined(XLLM_AVX512)
  return (vf)_mm512_cvtepi32_ps((__m512i)v);
#elif defined(__AVX2__)
  return (vf)_mm256_cvtepi32_ps((__m256i)v);
#else
  return __builtin_convertvector(v, vf);
#endif
}

XLLM_INLINE vf to_floats(vf v) { return v; }

XLLM_INLINE vf widen(vh v) { return as_float(zero_extend(v) << 16); }

XLLM_INLINE vh narrow(vf v) {
#if defined(XLLM_AVX512) && defined(__AVX512BF16__)
  return (vh)_mm512_cvtneps_pbh((__m512)v);
#else
  const vu bits = as_bits(v);
  const vu rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const vi is_nan = v != v;
  return truncate((vu)(is_nan ? (vi{} + 0x7fc0) : (vi)rounded));
#endif
}

XLLM_INLINE float to_float(float x) { return x; }
XLLM_INLINE float to_float(bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
template <class T>
XLLM_INLINE T from_float(float x);
template <>
XLLM_INLINE float from_float<float>(float x) {
  return x;
}
template <>
XLLM_INLINE bf16 from_float<bf16>(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return {0x7fc0};
  return {uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

XLLM_INLINE vf load(const float* p) { return load_raw<vf>(p); }
XLLM_INLINE vf load(const bf16* p) { return widen(load_raw<vh>(p)); }
XLLM_INLINE void store(float* p, vf v) { store_raw(p, v); }
XLLM_INLINE void store(bf16* p, vf v) { store_raw(p, narrow(v)); }

// a * b + c, rounded once where the CPU can. The compiler fuses the plain expression in some places and not in others.
XLLM_INLINE vf multiply_add(vf a, vf b, vf c) {
#if defined(XLLM_AVX512)
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// The first n < kLanes elements; the other lanes are zero. Never touches memory past them.
template <class T>
XLLM_INLINE vf load_part(const T* p, int64_t n) {
  T tmp[kLanes] = {};
  std::memcpy(tmp, p, n * sizeof(T));
  return load(tmp);
}
template <class T>
XLLM_INLINE void store_part(T* p, vf v, int64_t n) {
  T tmp[kLanes];
  store(tmp, v);
  std::memcpy(p, tmp, n * sizeof(T));
}

// Calls body(offset, count) for each vector of [0, n); only the last count is below kLanes. Load and store through
// load_n/store_n, which drop the tail handling when count is the constant kLanes.
template <class F>
XLLM_INLINE void for_vectors(int64_t n, F body) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) body(i, int64_t(kLanes));
  if (i < n) body(i, n - i);
}
template <class T>
XLLM_INLINE vf load_n(const T* p, int64_t n) {
  return n == kLanes ? load(p) : load_part(p, n);
}
template <class T>
XLLM_INLINE void store_n(T* p, vf v, int64_t n) {
  n == kLanes ? store(p, v) : store_part(p, v, n);
}

// Fixed pairwise order, so that a sum has the same bits wherever it is computed.
XLLM_INLINE float sum(vf v) {
  float lanes[kLanes];
  store(lanes, v);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}
XLLM_INLINE vf max(vf a, vf b) { return a < b ? b : a; }
XLLM_INLINE float max(vf v) {
#if defined(XLLM_AVX512)
  return _mm512_reduce_max_ps((__m512)v);
#else
  float lanes[kLanes], best;
  store(lanes, v);
  best = lanes[0];
  for (int i = 1; i < kLanes; ++i) best = lanes[i] > best ? lanes[i] : best;
  return best;
#endif
}

// e^x, about 1 ulp; exactly 1 at 0, 0 below -87.7, finite (2.4e38) above 88.3, NaN stays NaN.
XLLM_INLINE vf exp(vf x) {
  const vf low = splat(-88.5f), high = splat(88.3f);
  x = x < low ? low : x;
  x = x > high ? high : x;
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low mantissa bits.
  const vf shifted = x * 1.44269504f + magic;
  const vf n = shifted - magic;
  const vf f = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = (p * f) * f + f + 1.0f;
  // The low bits of `shifted` are n; n = -128 and -127 give the exponent 0, which is the factor 0.
  const vi biased = (vi)shifted - 0x4b400000 + 127;
  const vi exponent = biased < 0 ? vi{} : biased;
  return p * (vf)(exponent << 23);
}

// 1 / x for x in [1, 2^126], about 1 ulp: a division of 16 floats takes as long as the whole of exp.
XLLM_INLINE vf reciprocal(vf x) {
#if defined(XLLM_AVX512)
  const vf guess = (vf)_mm512_rcp14_ps((__m512)x);
  return guess * (2.0f - x * guess);
#else
  return 1.0f / x;
#endif
}

}  // namespace xllm
