// The KV cache of a layer and the metadata of a step, checked once per call so that kernels can trust the indices.
#pragma once

#include <algorithm>

#include "shim_util.h"

namespace xllm {

// Bytes of the float32 scale behind the codes of a row.
constexpr int64_t kScaleBytes = 4;

// [slots, max_tokens, 2, heads, head_dim], any strides but a contiguous last axis; rows of an int8 cache are head_dim
// codes and their scale.
struct Cache {
  View view;
  int64_t slots, max_tokens, heads, head_dim;
  bool is_int8;

  explicit Cache(const View& cache) : view(cache) {
    view.expect_dim(5).expect_size(2, 2).expect_last_contiguous();
    slots = view.sizes[0];
    max_tokens = view.sizes[1];
    heads = view.sizes[3];
    is_int8 = view.dtype == aoti_torch_dtype_int8();
    head_dim = view.sizes[4] - (is_int8 ? kScaleBytes : 0);
    check(heads >= 1 && head_dim >= 1, "kv_cache has %lld heads of %lld", (long long)heads, (long long)head_dim);
  }
  template <class T>
  T* key(int64_t slot, int64_t position, int64_t head) const {
    return view.ptr<T>() + slot * view.strides[0] + position * view.strides[1] + head * view.strides[3];
  }
  template <class T>
  T* value(int64_t slot, int64_t position, int64_t head) const {
    return key<T>(slot, position, head) + view.strides[2];
  }
  float scale(const int8_t* row) const {
    float value;
    std::memcpy(&value, row + head_dim, kScaleBytes);
    return value;
  }
  // x is what the cache holds, or rounds to codes.
  const View& expect_kind_of(const View& x) const { return is_int8 ? x : x.expect_dtype(view.dtype); }
};

struct Step {
  Ints seq_start, slot;
  int64_t sequences;

  Step(int64_t rows, const View& starts, const View& slots, const Cache& cache) : seq_start(starts), slot(slots) {
    sequences = slot.size;
    starts.expect_size(0, sequences + 1);
    check(seq_start[0] == 0, "seq_start[0] is %lld, expected 0", (long long)seq_start[0]);
    for (int64_t s = 0; s < sequences; ++s) {
      check(seq_start[s] <= seq_start[s + 1], "seq_start[%lld] is %lld, more than the next one (%lld)", (long long)s,
            (long long)seq_start[s], (long long)seq_start[s + 1]);
      check(seq_start[s] == seq_start[s + 1] || (slot[s] >= 0 && slot[s] < cache.slots),
            "slot[%lld] is %lld, kv_cache has %lld slots", (long long)s, (long long)slot[s], (long long)cache.slots);
    }
    check(tokens() <= rows, "seq_start ends at %lld, the step has %lld rows", (long long)tokens(), (long long)rows);
  }
  int64_t tokens() const { return seq_start[sequences]; }
  int64_t slot_of(int64_t token) const {
    int64_t low = 0, high = sequences;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (seq_start[middle] <= token ? low : high) = middle;
    }
    return slot[low];
  }
  void check_positions(const Ints& positions, const Cache& cache) const {
    check(positions.size >= tokens(), "positions has %lld entries for %lld tokens", (long long)positions.size,
          (long long)tokens());
    for (int64_t token = 0; token < tokens(); ++token)
      check(positions[token] >= 0 && positions[token] < cache.max_tokens,
            "positions[%lld] is %lld, a slot of kv_cache holds %lld tokens", (long long)token,
            (long long)positions[token], (long long)cache.max_tokens);
  }
};

}  // namespace xllm
