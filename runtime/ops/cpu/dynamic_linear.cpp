// int8_dynamic_linear and int4_dynamic_linear: x rounded to int8 row by row, weights of int8 or int4, sums in int32.
//
// For one row as for thousands, so that a row does not depend on the batch: fewer instructions than products that are
// not rounded take at any number of rows.
#include "quantised.h"
#include "quantised_args.h"

using namespace xllm;

XLLM_EXPORT AOTITorchError aoti_torch_cpu_int8_dynamic_linear(AtenTensorHandle x_handle,
                                                              AtenTensorHandle weight_handle,
                                                              AtenTensorHandle scale_handle,
                                                              AtenTensorHandle* bias_handle, int64_t out_features,
                                                              int32_t f32_out, AtenTensorHandle* ret0) {
  return run("int8_dynamic_linear", [&] {
    const View x("x", x_handle), weight("weight", weight_handle), scale("scale", scale_handle);
    Product job = quantised_product(x, weight, bias_handle, out_features, f32_out);
    check_int8(x, weight, scale, out_features);
    // Sums of 128 * 127 fit an int32.
    check(x.sizes[1] <= (int64_t(1) << 17), "x.shape[1] is %lld, at most 131072 are supported", (long long)x.sizes[1]);
    job.scale = scale.ptr<const float>();
    job.steps = weight.sizes[1];
    Output out({job.rows, job.columns}, f32_out ? aoti_torch_dtype_float32() : x.dtype);
    job.out = out.ptr<void>();
    using Columns = RoundedColumns<Int8Bytes>;
    dispatch(x, [&](auto tag) {
      const RoundedWeight<Columns> rounded{{weight.ptr<const uint8_t>(), weight.strides[0]}};
      if (job.rows > 0) linear_registers<decltype(tag)>(x, job, rounded);
    });
    out.release(ret0);
  });
}

XLLM_EXPORT AOTITorchError aoti_torch_cpu_int4_dynamic_linear(AtenTensorHandle x_handle,
                                                              AtenTensorHandle weight_handle,
                                                              AtenTensorHandle scale_handle,
                                                              AtenTensorHandle* bias_handle, int64_t out_features,
                                                              int32_t f32_out, AtenTensorHandle* ret0) {
  return run("int4_dynamic_linear", [&] {
    const View x("x", x_handle), weight("weight", weight_handle), scale("scale", scale_handle);
    Product job = quantised_product(x, weight, bias_handle, out_features, f32_out);
    const int64_t group_size = check_groups(x, weight, 8, scale, aoti_torch_dtype_bfloat16());
    // Sums of 15 * 127 fit an int32 as well as those of int8.
    check(group_size <= (int64_t(1) << 17), "scale has groups of %lld, at most 131072 are supported",
          (long long)group_size);
    job.steps = x.sizes[1] / 4;
    Output out({job.rows, job.columns}, f32_out ? aoti_torch_dtype_float32() : x.dtype);
    job.out = out.ptr<void>();
    using Columns = GroupedColumns<RoundedColumns<Int4Bytes>, false>;
    dispatch(x, [&](auto tag) {
      const RoundedWeight<Columns> rounded{{{weight.ptr<const uint8_t>(), weight.strides[0]},
                                            scale.ptr<const bf16>(),
                                            nullptr,
                                            scale.strides[0],
                                            group_size / 4}};
      if (job.rows > 0) linear_registers<decltype(tag)>(x, job, rounded);
    });
    out.release(ret0);
  });
}
