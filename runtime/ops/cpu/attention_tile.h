// A block of keys against a tile of rows: scores, online softmax, weighted sum of the values.
//
// Two ways to feed the register tile, with the same sums in the same order. The wide way transposes the block's keys
// and pairs its values into buffers that many row tiles share. The narrow way serves a single tile of rows (decode):
// keys are transposed a column tile at a time and values are read where they lie, so that each byte of the cache
// passes through L1 once; it is bound by memory, and prefetches of the next block are spread through its loops.
//
// C is what the cache holds: T itself, or int8 codes, which become operands of T exactly. The wide way unpacks them into
// its buffers, the narrow way in registers. The scales of keys multiply scores, those of values the weights.
#pragma once

#include <utility>

#include "attention_state.h"
#include "int8_codes.h"

namespace xllm {

// Prefetches tokens [begin, end) of an item in the order they lie in memory, a few lines at a time. Heads and tokens lie
// too far apart for the hardware prefetchers to follow the kernels, and a burst of prefetches would stall them.
class Stream {
 public:
  template <class C>
  static Stream of(const Problem& p, const Item& item, int64_t begin, int64_t end) {
    Stream s;
    const int64_t size = sizeof(C), row = p.cache.view.sizes[4] * size;
    const bool joined = p.cache.view.strides[3] == p.cache.view.sizes[4];
    s.heads_ = joined ? 1 : item.heads();
    s.run_lines_ = ((joined ? row * item.heads() : row) + 63) / 64;
    s.token_stride_ = p.cache.view.strides[1] * size;
    s.value_stride_ = p.cache.view.strides[2] * size;
    s.head_stride_ = p.cache.view.strides[3] * size;
    s.token_ = reinterpret_cast<const char*>(p.cache.key<const C>(p.slot[item.sequence], begin, item.head_begin));
    s.tokens_ = std::max<int64_t>(0, end - begin);
    s.run_ = -1;
    return s;
  }
  int64_t lines_per_token() const { return 2 * heads_ * run_lines_; }
  // Fetches up to `lines` lines; returns how many of them there were no more tokens for.
  XLLM_INLINE int64_t step(int64_t lines) {
    while (lines > 0 && (left_ > 0 || next_run())) {
      const int64_t count = std::min(lines, left_);
      for (int64_t i = 0; i < count; ++i) __builtin_prefetch(at_ + 64 * i, 0, 2);
      at_ += 64 * count;
      left_ -= count;
      lines -= count;
    }
    return lines;
  }

 private:
  bool next_run() {
    if (tokens_ == 0) return false;
    if (++run_ == 2 * heads_) {
      run_ = 0;
      token_ += token_stride_;
      if (--tokens_ == 0) return false;
    }
    at_ = token_ + run_ / heads_ * value_stride_ + run_ % heads_ * head_stride_;
    left_ = run_lines_;
    return true;
  }
  const char *token_, *at_ = nullptr;
  int64_t heads_, run_lines_, token_stride_, value_stride_, head_stride_, tokens_ = 0, run_, left_ = 0;
};

// What is fetched while an item runs: the rest of it, then the first block of the item that the thread runs next.
struct Ahead {
  Stream rest, next;
  XLLM_INLINE void step(int64_t lines) {
    lines = rest.step(lines);
    if (lines > 0) next.step(lines);
  }
};

// One block of keys of one head, [keys.begin, keys.begin + kKeys) as far as keys.end.
struct Block {
  const Problem& p;
  const Buffers& b;
  const Rows& rows;
  int64_t slot, head;
  Range keys;
  Ahead& ahead;
};

// Transposes `count` keys from `first` on, in units of 4 bytes; prefetches `lines` after every 16 x 16 units.
template <class C>
void transpose_keys(const Block& block, int64_t first, int64_t count, uint32_t* to, int64_t ld, int64_t lines) {
  for (int64_t key = first; key < first + count && block.keys.begin + key < block.keys.end; key += 16) {
    const C* rows[16];
    const int height = int(std::min({int64_t(16), first + count - key, block.keys.end - block.keys.begin - key}));
    for (int i = 0; i < height; ++i)
      rows[i] = block.p.cache.key<const C>(block.slot, block.keys.begin + key + i, block.head);
    transpose_units(rows, height, block.p.cache.head_dim, to + key - first, ld, [&] { block.ahead.step(lines); });
  }
}

// Lines of 16 keys in 16 units, with the scales of codes.
template <class C>
constexpr int64_t kKeyLines = sizeof(C) == 1 ? 18 : 16;

// The block's keys in the key buffer.
template <class T, class C>
void load_keys(const Block& block) {
  if constexpr (sizeof(C) == sizeof(T)) {
    transpose_keys<C>(block, 0, kKeys, block.b.keys, kKeys, 2 * kKeyLines<C>);
  } else {
    constexpr int kUnits = Int8Codes<T>::kUnits;
    transpose_keys<C>(block, 0, kKeys, block.b.codes, kKeys, 2 * kKeyLines<C>);
    const uint32_t* from = block.b.codes;
    for (int64_t first = 0; first < block.p.units; first += kUnits, from += kKeys) {
      const int64_t units = std::min<int64_t>(kUnits, block.p.units - first);
      for (int64_t key = 0; key < kKeys; key += kLanes) {
        const Int8Codes<T> codes(reinterpret_cast<const uint8_t*>(from + key));
        for (int unit = 0; unit < units; ++unit)
          Dot<T>::store_exact(block.b.keys + (first + unit) * kKeys + key, codes.operand(unit));
      }
    }
  }
}

// Scales of the block's codes; zeros after the last key, whose weight is zero, but zero times what was there may be NaN.
inline void load_scales(const Block& block) {
  const Cache& cache = block.p.cache;
  const int64_t count = block.keys.end - block.keys.begin;
  const int8_t* key = cache.key<const int8_t>(block.slot, block.keys.begin, block.head);
  for (int64_t k = 0; k < count; ++k, key += cache.view.strides[1]) {
    block.b.key_scales[k] = cache.scale(key) * block.p.scale;
    block.b.value_scales[k] = cache.scale(key + cache.view.strides[2]);
  }
  std::fill(block.b.key_scales + count, block.b.key_scales + kKeys, 0.0f);
  std::fill(block.b.value_scales + count, block.b.value_scales + kKeys, 0.0f);
}

void load_values(const Problem& p, int64_t slot, int64_t head, Range keys, uint32_t* to, float) {
  for (int64_t key = keys.begin; key < keys.end; ++key, to += p.padded_dim) {
    const float* row = p.cache.value<const float>(slot, key, head);
    for_vectors(p.cache.head_dim,
                [&](int64_t i, int64_t n) { store(reinterpret_cast<float*>(to) + i, load_n(row + i, n)); });
  }
}

XLLM_INLINE vu widen_bits(const bf16* p, int64_t n) {
  uint16_t tmp[kLanes] = {};
  if (n == kLanes) return zero_extend(load_raw<vh>(p));
  std::memcpy(tmp, p, n * 2);
  return zero_extend(load_raw<vh>(tmp));
}


void load_values(const Problem& p, int64_t slot, int64_t head, Range keys, uint32_t* to, bf16) {
  for (int64_t key = keys.begin; key < keys.end; key += 2, to += p.padded_dim) {
    const bf16* even = p.cache.value<const bf16>(slot, key, head);
    // The partner of the last key is a zero: its weight is zero, but zero times whatever lies there may be NaN.
    const bf16* odd = key + 1 < keys.end ? p.cache.value<const bf16>(slot, key + 1, head) : nullptr;
#if defined(XLLM_AVX512) && defined(__AVX512BF16__)
    if (odd != nullptr && p.cache.head_dim % 32 == 0) {
      for (int64_t i = 0; i < p.cache.head_dim; i += 32) {
        Dot<bf16>::Operand pairs[kTileVecs];
        Dot<bf16>::from_rows(even + i, odd + i, pairs);
        for (int v = 0; v < kTileVecs; ++v) store_raw(to + i + v * kLanes, pairs[v]);
      }
      continue;
    }
#endif
    for_vectors(p.cache.head_dim, [&](int64_t i, int64_t n) {
      vu pair = widen_bits(even + i, n);
      if (odd != nullptr) pair |= widen_bits(odd + i, n) << 16;
      store_raw(to + i, pair);
    });
  }
}

// Values of an int8 cache, unpacked.
template <class T>
void unpack_values(const Block& block) {
  const Cache& cache = block.p.cache;
  const int8_t* even = cache.value<const int8_t>(block.slot, block.keys.begin, block.head);
  uint32_t* to = block.b.values;
  for (int64_t key = block.keys.begin; key < block.keys.end; key += kPair<T>, to += block.p.padded_dim) {
    // The partner of the last key is a zero, as its weight is.
    const int8_t* odd = key + 1 < block.keys.end ? even + cache.view.strides[1]
                                                 : reinterpret_cast<const int8_t*>(block.b.zeros);
    int64_t i = 0;
    for (; i + kTileColumns <= cache.head_dim; i += kTileColumns) {
      typename Dot<T>::Operand columns[kTileVecs];
      operands_from_codes<T>(even + i, odd + i, columns);
      for (int v = 0; v < kTileVecs; ++v) Dot<T>::store_exact(to + i + v * kLanes, columns[v]);
    }
    for (; i < cache.head_dim; i += kLanes) {
      const int64_t count = std::min<int64_t>(kLanes, cache.head_dim - i);
      const vf first = widen_codes(even + i, count);
      if constexpr (kPair<T> == 2)
        Dot<T>::store_exact(to + i, Dot<T>::exact_pair(first, widen_codes(odd + i, count)));
      else
        Dot<T>::store_exact(to + i, first);
    }
    even += kPair<T> * cache.view.strides[1];
  }
}

// multiply() of keys that are codes, transposed with `ld` keys to a unit of 4.
template <class T, int R, int N>
XLLM_INLINE void multiply_codes(const Block& block, const uint32_t* queries, const uint32_t* keys, int64_t ld,
                                vf (&acc)[R][N * kTileVecs]) {
  constexpr int kUnits = Int8Codes<T>::kUnits;
  for (int64_t unit = 0; unit < block.p.units; unit += kUnits, queries += kUnits * R, keys += ld) {
    // Vector by vector: all codes and all sums would not fit the registers.
#pragma GCC unroll 16
    for (int v = 0; v < N * kTileVecs; ++v) {
      const Int8Codes<T> codes(reinterpret_cast<const uint8_t*>(keys + v * kLanes));
#pragma GCC unroll 16
      for (int u = 0; u < kUnits; ++u) {
        const typename Dot<T>::Operand column = codes.operand(u);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) acc[r][v] = Dot<T>::add(acc[r][v], Dot<T>::broadcast(queries + u * R + r), column);
      }
    }
  }
}

// Scaled and masked scores of column tiles [first, first + N * kTileColumns) of the block; updates each row's maximum.
// `keys` are units of C.
template <class T, class C, int R, int N>
XLLM_INLINE void score_keys(const Block& block, int64_t row, const uint32_t* queries, const uint32_t* keys, int64_t ld,
                            int64_t first, vf (&best)[R]) {
  const Rows& rows = block.rows;
  const int64_t begin = block.keys.begin;
  const bool edge = rows.low(row + R - 1) > begin || rows.position(row) + 1 < begin + kKeys;
  vf acc[R][N * kTileVecs] = {};
  if constexpr (sizeof(C) == sizeof(T))
    multiply<T, R, N>(queries, 1, R, keys, ld, kTileColumns, block.p.units, acc);
  else
    multiply_codes<T, R, N>(block, queries, keys, ld, acc);
  vf products[R][N * kTileVecs];
  unrolled_copy(acc, products);
  vi lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  for (int r = 0; r < R; ++r) {
    const int32_t low = int32_t(std::max<int64_t>(rows.low(row + r) - begin, 0));
    const int32_t high = int32_t(std::min<int64_t>(rows.position(row + r) + 1 - begin, kKeys));
    for (int v = 0; v < N * kTileVecs; ++v) {
      vf score = products[r][v] * load(block.b.key_scales + first + v * kLanes);
      const vi index = lane + int32_t(first + v * kLanes);
      if (edge) score = (vi)((index < low) | (index >= high)) ? splat(kMinusInfinity) : score;
      best[r] = max(best[r], score);
      store(block.b.scores + r * kKeys + first + v * kLanes, score);
    }
  }
}

// Turns the scores into weights and returns the factors by which earlier sums shrink.
template <class T, int R>
XLLM_INLINE void update_softmax(const Buffers& b, int64_t state, const vf (&best)[R], vf (&factor)[R]) {
  for (int r = 0; r < R; ++r) {
    float& maximum = b.split.maximum[state + r];
    const float joint = std::max(maximum, max(best[r]));
    // A row that has seen no key yet: any finite reference gives weights of zero instead of NaN.
    const float reference = joint == kMinusInfinity ? 0.0f : joint;
    factor[r] = exp(splat(maximum - reference));
    maximum = joint;
    vf total = b.split.total[state + r] * factor[r];
    for (int64_t i = 0; i < kKeys; i += kLanes) {
      const vf weight = exp(load(b.scores + r * kKeys + i) - reference);
      total += weight;
      store(reinterpret_cast<T*>(b.probs) + r * kKeys + i, weight * load(b.value_scales + i));
    }
    b.split.total[state + r] = total;
  }
}

// out[r] = out[r] * factor[r] + product for N column tiles; product(acc) adds weights . values.
template <int R, int N, class F>
XLLM_INLINE void add_values(int64_t width, const vf (&factor)[R], float* out, F product) {
  vf acc[R][N * kTileVecs];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < N * kTileVecs; ++v) acc[r][v] = load(out + r * width + v * kLanes) * factor[r];
  }
  product(acc);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < N * kTileVecs; ++v) store(out + r * width + v * kLanes, acc[r][v]);
  }
}

// Values taken from the cache rows themselves.
template <class T, class C, int R, int N>
XLLM_INLINE void multiply_rows(const Block& block, int64_t column, vf (&acc)[R][N * kTileVecs]) {
  const C* even = block.p.cache.value<const C>(block.slot, block.keys.begin, block.head) + column;
  const int64_t stride = block.p.cache.view.strides[1], count = block.keys.end - block.keys.begin;
  for (int64_t k = 0; k < count; k += kPair<T>, even += kPair<T> * stride) {
    // The partner of the last key is a zero: its weight is zero, but zero times whatever lies there may be NaN.
    const C* odd = k + 1 < count ? even + stride : reinterpret_cast<const C*>(block.b.zeros);
    typename Dot<T>::Operand columns[N][kTileVecs];
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) {
      if constexpr (sizeof(C) == sizeof(T))
        Dot<T>::from_rows(even + n * kTileColumns, odd + n * kTileColumns, columns[n]);
      else
        operands_from_codes<T>(even + n * kTileColumns, odd + n * kTileColumns, columns[n]);
    }
    // The lines of kPair<C> rows.
    if (sizeof(C) == sizeof(T) || k % kPair<C> == 0) block.ahead.step(N * kTileColumns / 16);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const typename Dot<T>::Operand weight = Dot<T>::broadcast(block.b.probs + (r * kKeys + k) / kPair<T>);
#pragma GCC unroll 16
      for (int v = 0; v < N * kTileVecs; ++v)
        acc[r][v] = Dot<T>::add(acc[r][v], weight, columns[v / kTileVecs][v % kTileVecs]);
    }
  }
}

// Rows [row, row + R), whose states start at `state`, against a block whose keys and values are in the buffers.
template <class T, int R>
void wide_block(const Block& block, int64_t row, int64_t state) {
  const Problem& p = block.p;
  constexpr int N = std::min<int64_t>(kWide<R>, kKeys / kTileColumns);
  vf best[R], factor[R];
  for (int r = 0; r < R; ++r) best[r] = splat(kMinusInfinity);
  for (int64_t first = 0; first < kKeys; first += N * kTileColumns)
    score_keys<T, T, R, N>(block, row, block.b.queries + state * p.units, block.b.keys + first, kKeys, first, best);
  update_softmax<T, R>(block.b, state, best, factor);
  float* out = block.b.split.out + state * p.padded_dim;
  const int64_t steps = units_of<T>(block.keys.end - block.keys.begin);
  const auto values = [&](int64_t column, auto& acc) {
    constexpr int kTiles = sizeof(acc[0]) / sizeof(vf) / kTileVecs;
    multiply<T, R, kTiles>(block.b.probs, kKeys / kPair<T>, 1, block.b.values + column, p.padded_dim, kTileColumns,
                           steps, acc);
  };
  int64_t column = 0;
  for (; column + kWide<R> * kTileColumns <= p.padded_dim; column += kWide<R> * kTileColumns)
    add_values<R, kWide<R>>(p.padded_dim, factor, out + column, [&](auto& acc) { values(column, acc); });
  for (; column < p.padded_dim; column += kTileColumns)
    add_values<R, 1>(p.padded_dim, factor, out + column, [&](auto& acc) { values(column, acc); });
}

// The same for the only tile of rows of an item; needs whole column tiles (head_dim == padded_dim).
template <class T, class C, int R>
void narrow_block(const Block& block, int64_t row, int64_t state) {
  const Problem& p = block.p;
  vf best[R], factor[R];
  for (int r = 0; r < R; ++r) best[r] = splat(kMinusInfinity);
  constexpr int N = R <= 2 ? std::min<int64_t>(kWide<R>, kKeys / kTileColumns) : 1;
  const int64_t count = block.keys.end - block.keys.begin;
  const uint32_t* queries = block.b.queries + state * p.units;
  const auto score = [&](auto tiles, int64_t first) {
    constexpr int kTiles = decltype(tiles)::value;
    transpose_keys<C>(block, first, kTiles * kTileColumns, block.b.keys, kTiles * kTileColumns, kKeyLines<C>);
    score_keys<T, C, R, kTiles>(block, row, queries, block.b.keys, kTiles * kTileColumns, first, best);
  };
  int64_t first = 0;
  for (; first + (N - 1) * kTileColumns < count; first += N * kTileColumns)
    score(std::integral_constant<int, N>(), first);
  for (; first < count; first += kTileColumns) score(std::integral_constant<int, 1>(), first);
  // Not left out: the compiler may round the sum of a shorter loop otherwise, and rows must not depend on the way.
  for (int r = 0; r < R; ++r)
    for (int64_t i = first; i < kKeys; i += kLanes) store(block.b.scores + r * kKeys + i, splat(kMinusInfinity));
  update_softmax<T, R>(block.b, state, best, factor);
  float* out = block.b.split.out + state * p.padded_dim;
  int64_t column = 0;
  for (; column + kWide<R> * kTileColumns <= p.padded_dim; column += kWide<R> * kTileColumns)
    add_values<R, kWide<R>>(p.padded_dim, factor, out + column,
                            [&](auto& acc) { multiply_rows<T, C, R, kWide<R>>(block, column, acc); });
  for (; column < p.padded_dim; column += kTileColumns)
    add_values<R, 1>(p.padded_dim, factor, out + column,
                     [&](auto& acc) { multiply_rows<T, C, R, 1>(block, column, acc); });
}

using BlockKernel = void (*)(const Block&, int64_t, int64_t);

template <class T, class C, int... I>
BlockKernel block_kernel(bool narrow, int64_t rows, std::integer_sequence<int, I...>) {
  static constexpr BlockKernel kNarrow[] = {narrow_block<T, C, I + 1>...}, kWideRows[] = {wide_block<T, I + 1>...};
  return (narrow ? kNarrow : kWideRows)[rows - 1];
}

}  // namespace xllm
