// What attention works on: the problem, how it is cut, and the running softmax of its rows.
#pragma once

#include <algorithm>
#include <limits>

#include "step.h"
#include "tile.h"

namespace xllm {

// Keys of a block: the unit of the online softmax. 64 keys of 128 bfloat16 elements are half of a 32 KiB L1.
constexpr int64_t kKeys = 64;
// Keys whose softmax runs online; partial results of splits are merged in ascending order.
constexpr int64_t kSplit = 512;
// Rows of the highest tile.
constexpr int64_t kMaxRowTile = 16;
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

struct Problem {
  View q;
  Cache cache;
  Ints seq_start, context_len, slot;
  int64_t group, units, padded_dim;
  float scale;
  int64_t window;
  void* out;
  // Rows taken at once, and whether the query buffer has room for whole tiles.
  int64_t row_tile = kTileRows;
  bool pads_queries = false;
};

// Softmax state of a row: maximum, per-lane sums and unnormalised output [padded_dim].
struct State {
  float* maximum;
  vf* total;
  float* out;
  int64_t width;

  static int64_t bytes(int64_t rows, int64_t width) { return rows * (64 + int64_t(sizeof(vf)) + width * 4); }
  State(char* memory, int64_t rows, int64_t row_width) : width(row_width) {
    total = reinterpret_cast<vf*>(memory);
    out = reinterpret_cast<float*>(memory + rows * sizeof(vf));
    maximum = out + rows * width;
  }
  void clear(int64_t begin, int64_t end) {
    std::fill(maximum + begin, maximum + end, kMinusInfinity);
    std::memset(total + begin, 0, (end - begin) * sizeof(vf));
    std::memset(out + begin * width, 0, (end - begin) * width * 4);
  }
  // this[row] joined with other[other_row]. Into an empty state this copies bit for bit (factors 0 and 1).
  void merge(int64_t row, const State& other, int64_t other_row) {
    const float theirs = other.maximum[other_row];
    if (theirs == kMinusInfinity) return;
    const float joint = std::max(maximum[row], theirs);
    const vf keep = exp(splat(maximum[row] - joint)), take = exp(splat(theirs - joint));
    maximum[row] = joint;
    total[row] = total[row] * keep + other.total[other_row] * take;
    for (int64_t i = 0; i < width; i += kLanes)
      store(out + row * width + i,
            load(out + row * width + i) * keep + load(other.out + other_row * width + i) * take);
  }
};

// Thread-local buffers, all 64-byte aligned.
struct Buffers {
  uint32_t *keys, *values, *probs, *queries, *zeros;
  // Keys of an int8 cache, transposed in units of 4 codes.
  uint32_t* codes;
  float* scores;
  // What the scores and the weights of a block's keys are multiplied by: p.scale and 1, times the scales of an int8
  // cache.
  float *key_scales, *value_scales;
  State split, whole;

  static int64_t align(int64_t bytes) { return (bytes + 63) / 64 * 64; }
  static int64_t bytes(const Problem& p, int64_t rows) {
    return align(p.units * kKeys * 4) + align(kKeys * p.padded_dim * 4) + 2 * align(kMaxRowTile * kKeys * 4) +
           align(rows * p.units * 4) + align(p.padded_dim * 4) + align(codes_bytes(p)) + 2 * align(kKeys * 4) +
           2 * align(State::bytes(rows, p.padded_dim)) + 64;
  }
  Buffers(char* memory, const Problem& p, int64_t rows)
      : keys(take<uint32_t>(memory, p.units * kKeys * 4)),
        values(take<uint32_t>(memory, kKeys * p.padded_dim * 4)),
        probs(take<uint32_t>(memory, kMaxRowTile * kKeys * 4)),
        queries(take<uint32_t>(memory, rows * p.units * 4)),
        zeros(take<uint32_t>(memory, p.padded_dim * 4)),
        codes(take<uint32_t>(memory, codes_bytes(p))),
        scores(take<float>(memory, kMaxRowTile * kKeys * 4)),
        key_scales(take<float>(memory, kKeys * 4)),
        value_scales(take<float>(memory, kKeys * 4)),
        split(take<char>(memory, State::bytes(rows, p.padded_dim)), rows, p.padded_dim),
        whole(take<char>(memory, State::bytes(rows, p.padded_dim)), rows, p.padded_dim) {}

 private:
  static int64_t codes_bytes(const Problem& p) {
    return p.cache.is_int8 ? units_of<int8_t>(p.cache.head_dim) * kKeys * 4 : 0;
  }
  template <class T>
  static T* take(char*& memory, int64_t bytes) {
    char* start = memory;
    memory += align(bytes);
    return reinterpret_cast<T*>(start);
  }
};

struct Range {
  int64_t begin, end;
};

// Positions of the rows' tokens follow from the context: the step's tokens are its last ones.
struct Rows {
  int64_t first_position, group, window;
  int64_t position(int64_t row) const { return first_position + row / group; }
  int64_t low(int64_t row) const { return window > 0 ? std::max<int64_t>(0, position(row) - window + 1) : 0; }
  Range keys(int64_t begin, int64_t end) const { return {low(begin), position(end - 1) + 1}; }
};

// Rows [row_begin, row_end) of kv heads [head_begin, head_end) of a sequence over splits [split_begin, split_end).
// Row r of head h has state row (h - head_begin) * rows() + r. partial >= 0 says where in the shared partial results
// the state goes, -1 that the item walks every split and writes the output itself.
struct Item {
  int64_t sequence, head_begin, head_end, row_begin, row_end, split_begin, split_end, partial;
  int64_t rows() const { return row_end - row_begin; }
  int64_t heads() const { return head_end - head_begin; }
  int64_t states() const { return rows() * heads(); }
};

}  // namespace xllm
