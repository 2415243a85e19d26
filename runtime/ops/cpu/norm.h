// Root-mean-square norm of one row, shared by the norm operators and the head norms of qkv_rope_write.
#pragma once

#include <cmath>

#include "vec.h"

namespace xllm {

template <class T>
inline float inverse_rms(const T* x, int64_t width, float eps) {
  // Four chains hide the latency of the additions.
  vf squares[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= width; i += 4 * kLanes)
    for (int chain = 0; chain < 4; ++chain) {
      const vf v = load(x + i + chain * kLanes);
      squares[chain] = v * v + squares[chain];
    }
  for_vectors(width - i, [&](int64_t j, int64_t n) {
    const vf v = load_n(x + i + j, n);
    squares[0] = v * v + squares[0];
  });
  return 1.0f / std::sqrt(sum((squares[0] + squares[1]) + (squares[2] + squares[3])) / float(width) + eps);
}

template <class T, class Out>
inline void scale_row(const T* x, const T* weight, float factor, int64_t width, Out* out) {
  for_vectors(width, [&](int64_t i, int64_t n) {
    store_n(out + i, load_n(x + i, n) * factor * load_n(weight + i, n), n);
  });
}

}  // namespace xllm
