// One matrix product with packed weights, as the kernels of packed_linear share it.
#pragma once

#include "packed.h"

namespace xllm {

struct Product {
  const uint32_t* weight;
  // In units; `steps` units are the reduction axis.
  int64_t block_stride, blocks, steps;
  int64_t rows, columns;
  const void* bias;
  void* out;
  bool f32_out;
};

// Up to kLanes results of `row` from column `first` on, with the bias, as the output's type.
template <class T>
XLLM_INLINE void store_results(const Product& job, int64_t row, int64_t first, int64_t count, vf y) {
  const int64_t at = row * job.columns + first;
  if (job.f32_out)
    store_n(static_cast<float*>(job.out) + at, y, count);
  else
    store_n(static_cast<T*>(job.out) + at, y, count);
}

}  // namespace xllm
