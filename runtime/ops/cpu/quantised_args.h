// Checks that the quantised products share.
#pragma once

#include "gemm.h"

namespace xllm {

// What is known of the product before the weights are looked at.
inline Product quantised_product(const View& x, const View& weight, AtenTensorHandle* bias_handle, int64_t out_features,
                                 bool f32_out) {
  x.expect_dim(2).expect_last_contiguous();
  check(out_features >= 1, "out_features is %lld, expected at least 1", (long long)out_features);
  weight.expect_dim(4).expect_size(0, (out_features + kBlockColumns - 1) / kBlockColumns);
  Product job{};
  if (bias_handle != nullptr) {
    const View bias("bias", *bias_handle);
    bias.expect_dim(1).expect_dtype(x.dtype).expect_size(0, out_features).expect_last_contiguous();
    job.bias = bias.data;
  }
  job.blocks = weight.sizes[0];
  job.rows = x.sizes[0];
  job.columns = out_features;
  job.f32_out = f32_out;
  return job;
}

// `steps` steps of 4 bytes for each of 32 columns.
inline void check_steps(const View& weight, int64_t steps) {
  weight.expect_size(1, steps).expect_size(2, kBlockColumns).expect_size(3, 4);
  expect_contiguous_blocks(weight);
}

inline void check_int8(const View& x, const View& weight, const View& scale, int64_t out_features) {
  weight.expect_dtype(aoti_torch_dtype_int8());
  check_steps(weight, (x.sizes[1] + 3) / 4);
  scale.expect_dim(1).expect_dtype(aoti_torch_dtype_float32()).expect_size(0, out_features).expect_last_contiguous();
}

// Of codes with `per_step` elements in a step of a column. Returns how many inputs share a scale.
inline int64_t check_groups(const View& x, const View& weight, int64_t per_step, const View& scale,
                            int32_t scale_dtype) {
  const int64_t in_features = x.sizes[1];
  weight.expect_dtype(per_step == 8 ? aoti_torch_dtype_uint8() : aoti_torch_dtype_int8());
  check(in_features % 8 == 0, "x.shape[1] is %lld, expected a multiple of 8", (long long)in_features);
  check_steps(weight, in_features / per_step);
  scale.expect_dim(3).expect_dtype(scale_dtype).expect_size(0, weight.sizes[0]).expect_size(2, kBlockColumns);
  expect_contiguous_blocks(scale);
  const int64_t groups = scale.sizes[1];
  check(groups > 0 && in_features % groups == 0 && in_features / groups % 8 == 0,
        "scale.shape[1] is %lld, expected to cut %lld inputs into groups of a multiple of 8", (long long)groups,
        (long long)in_features);
  return in_features / groups;
}

}  // namespace xllm
