// One matrix product with packed weights, as the kernels of packed_linear and of the quantised products share it.
//
// A weight answers two questions. Register kernels ask for columns(): what makes operands of a block of columns, see
// gemm_tile.h. AMX tiles ask for panel(block, unit, units, scratch): `units` units of one block, from unit `unit` on, in
// the layout of packed weights. What is stored that way is read where it lies; what is quantised is unpacked to scratch.
#pragma once

#include "packed.h"

namespace xllm {

struct Product {
  // `steps` units are the reduction axis.
  int64_t blocks, steps;
  int64_t rows, columns;
  // Of each column, in float32; null where sums are results.
  const float* scale;
  const void* bias;
  void* out;
  bool f32_out;
};

// Units past a panel that unpacking may write: it goes by whole steps of the quantised layout.
constexpr int64_t kUnpackSlack = 8 * kBlockColumns;

// What is done to the sums of up to kLanes columns from `first` on.
struct Finish {
  vf scale, bias;
  XLLM_INLINE vf operator()(vf sum) const { return multiply_add(sum, scale, bias); }
};
template <class T>
XLLM_INLINE Finish finish_of(const Product& job, int64_t first, int64_t count) {
  return {job.scale ? load_n(job.scale + first, count) : splat(1.0f),
          job.bias ? load_n(static_cast<const T*>(job.bias) + first, count) : vf{}};
}

// Up to kLanes results of `row` from column `first` on, as the output's type.
template <class T>
XLLM_INLINE void store_results(const Product& job, int64_t row, int64_t first, int64_t count, vf y) {
  const int64_t at = row * job.columns + first;
  if (job.f32_out)
    store_n(static_cast<float*>(job.out) + at, y, count);
  else
    store_n(static_cast<T*>(job.out) + at, y, count);
}

}  // namespace xllm
