// Rows rounded to int8, and their products with integers: exact sums in int32, which no order changes.
#pragma once

#include <algorithm>

#include "int8_codes.h"
#include "tile.h"

namespace xllm {

// Dot products of four bytes take one operand without a sign. That is the columns': each code with an offset added,
// which the sum over the row's codes takes off again before the first product.
//
// acc + the products of four bytes of `columns`, without a sign, and four of `row`, with one, in each lane. kBits are
// those of a column's byte: of 4 two products fit an int16.
template <int kBits>
XLLM_INLINE vi add_quads(vi acc, vu columns, vu row) {
#if defined(XLLM_AVX512) && defined(__AVX512VNNI__)
  return (vi)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)columns, (__m512i)row);
#elif defined(XLLM_AVX512)
  const __m512i a = (__m512i)row, b = (__m512i)columns;
  if constexpr (kBits == 4) return acc + (vi)_mm512_madd_epi16(_mm512_maddubs_epi16(b, a), _mm512_set1_epi16(1));
  const __m512i even = _mm512_madd_epi16(_mm512_srai_epi16(_mm512_slli_epi16(a, 8), 8),
                                         _mm512_and_si512(b, _mm512_set1_epi16(255)));
  return acc + (vi)even + (vi)_mm512_madd_epi16(_mm512_srai_epi16(a, 8), _mm512_srli_epi16(b, 8));
#elif defined(__AVX2__) && defined(__FMA__)
  const __m256i a = (__m256i)row, b = (__m256i)columns;
  if constexpr (kBits == 4) return acc + (vi)_mm256_madd_epi16(_mm256_maddubs_epi16(b, a), _mm256_set1_epi16(1));
  const __m256i even = _mm256_madd_epi16(_mm256_srai_epi16(_mm256_slli_epi16(a, 8), 8),
                                         _mm256_and_si256(b, _mm256_set1_epi16(255)));
  return acc + (vi)even + (vi)_mm256_madd_epi16(_mm256_srai_epi16(a, 8), _mm256_srli_epi16(b, 8));
#else
  for (int shift = 0; shift < 32; shift += 8) acc += ((vi)row << (24 - shift) >> 24) * (vi)(columns >> shift & 255u);
  return acc;
#endif
}

// kLanes columns of a step as `kUnits` operands of four bytes.
struct Int8Bytes {
  static constexpr int kUnits = 1, kBits = 8, kOffset = 128;
  static constexpr bool kIsInterleaved = false;
  Int8Bytes() = default;
  explicit XLLM_INLINE Int8Bytes(const uint8_t* from) : bytes(load_raw<vu>(from) ^ 0x80808080u) {}
  XLLM_INLINE vu operand(int) const { return bytes; }

 private:
  vu bytes;
};

// The low nibbles of a step are elements 0, 4, 1, 5, the high ones 2, 6, 3, 7: two rows of four, interleaved.
struct Int4Bytes {
  static constexpr int kUnits = 2, kBits = 4, kOffset = 8;
  static constexpr bool kIsInterleaved = true;
  Int4Bytes() = default;
  explicit XLLM_INLINE Int4Bytes(const uint8_t* from) : codes(load_raw<vu>(from)) {}
  XLLM_INLINE vu operand(int unit) const { return codes >> 4 * unit & 0x0f0f0f0fu; }

 private:
  vu codes;
};

// Bytes 0 to 3 of each eight to the even places, 4 to 7 to the odd ones.
inline void interleave(uint64_t* eights, int64_t count) {
  const auto spread = [](uint64_t four) {
    four = (four | four << 16) & 0x0000ffff0000ffffu;
    return (four | four << 8) & 0x00ff00ff00ff00ffu;
  };
  for (int64_t i = 0; i < count; ++i) eights[i] = spread(eights[i] & 0xffffffffu) | spread(eights[i] >> 32) << 8;
}

// Rounds up to kTileRows rows and packs them as quads of codes, [unit][row], zeros after the last code. `scratch` holds
// as much.
template <class T>
void round_tile(const T* const* rows, int count, int64_t width, int64_t units, bool is_interleaved, uint32_t* scratch,
                uint32_t* packed, float* scale) {
  const float* quads[kTileRows];
  uint32_t* rounded = count == 1 ? packed : scratch;
  for (int r = 0; r < count; ++r, rounded += units) {
    int8_t* to = reinterpret_cast<int8_t*>(rounded);
    scale[r] = round_row(rows[r], width, to);
    std::memset(to + width, 0, size_t(4 * units - width));
    if (is_interleaved) interleave(reinterpret_cast<uint64_t*>(rounded), units / 2);
    quads[r] = reinterpret_cast<const float*>(rounded);
  }
  if (count > 1) transpose_units(quads, count, units, packed, count);
}

// What the sums of each group of a packed tile begin with, [group][row]: -offset times the sum of the row's codes. Reads
// whole vectors, up to kLanes units past the tile.
inline void begin_groups(const uint32_t* packed, int count, int64_t units, int64_t group_units, int32_t offset,
                         int32_t* to) {
  for (int64_t unit = 0; unit < units; unit += group_units, to += count) {
    for (int first = 0; first < count; first += kLanes) {
      vi sums{};
      for (int64_t k = unit; k < unit + group_units; ++k)
        sums = add_quads<4>(sums, vu{} + 0x01010101u, load_raw<vu>(packed + k * count + first));
      sums *= -offset;
      std::memcpy(to + first, &sums, size_t(std::min(kLanes, count - first)) * 4);
    }
  }
}

}  // namespace xllm
