// int8_linear, int4_linear, int8_zero_linear and int4_zero_linear: products with quantised weights and unrounded
// activations.
//
// Rows, threads and instruction sets are what they are in packed_linear; memory is read in the quantised form.
#include "linear.h"
#include "quantised.h"
#include "quantised_args.h"

using namespace xllm;

XLLM_EXPORT AOTITorchError aoti_torch_cpu_int8_linear(AtenTensorHandle x_handle, AtenTensorHandle weight_handle,
                                                      AtenTensorHandle scale_handle, AtenTensorHandle* bias_handle,
                                                      int64_t out_features, int32_t f32_out, AtenTensorHandle* ret0) {
  return run("int8_linear", [&] {
    const View x("x", x_handle), weight("weight", weight_handle), scale("scale", scale_handle);
    Product job = quantised_product(x, weight, bias_handle, out_features, f32_out);
    check_int8(x, weight, scale, out_features);
    job.scale = scale.ptr<const float>();
    Output out({job.rows, job.columns}, f32_out ? aoti_torch_dtype_float32() : x.dtype);
    job.out = out.ptr<void>();
    dispatch(x, [&](auto tag) {
      using T = decltype(tag);
      job.steps = units_of<T>(x.sizes[1]);
      linear<T>(x, job, Int8Weight<T>{{weight.ptr<const uint8_t>(), weight.strides[0]}});
    });
    out.release(ret0);
  });
}

// With `zero` or, where it is null, without.
template <template <class> class CodesOf, bool kHasZero>
static void grouped_linear(const View& x, const View& weight, const View& scale, const View* zero,
                           AtenTensorHandle* bias_handle, int64_t out_features, bool f32_out, AtenTensorHandle* ret0) {
  Product job = quantised_product(x, weight, bias_handle, out_features, f32_out);
  const int64_t group_size = check_groups(x, weight, CodesOf<float>::kUnits, scale,
                                          kHasZero ? aoti_torch_dtype_float32() : aoti_torch_dtype_bfloat16());
  const bf16* zeros = nullptr;
  if constexpr (kHasZero) {
    zero->expect_dim(3).expect_dtype(aoti_torch_dtype_bfloat16()).expect_size(0, weight.sizes[0]);
    zero->expect_size(1, scale.sizes[1]).expect_size(2, kBlockColumns);
    expect_contiguous_blocks(*zero);
    check(zero->strides[0] == scale.strides[0], "zero.stride(0) is %lld, expected scale's %lld",
          (long long)zero->strides[0], (long long)scale.strides[0]);
    zeros = zero->ptr<const bf16>();
  }
  Output out({job.rows, job.columns}, f32_out ? aoti_torch_dtype_float32() : x.dtype);
  job.out = out.ptr<void>();
  dispatch(x, [&](auto tag) {
    using T = decltype(tag);
    using Weight = GroupedWeight<T, CodesOf, kHasZero>;
    job.steps = units_of<T>(x.sizes[1]);
    const auto with_codes = [&](auto codes) {
      return GroupedColumns<decltype(codes), kHasZero>{codes, scale.ptr<const typename Weight::Scale>(), zeros,
                                                       scale.strides[0], group_size / kPair<T>};
    };
    const uint8_t* data = weight.ptr<const uint8_t>();
    if constexpr (Weight::Codes::kHasUnits) {
      if (job.rows == 1 && group_size <= kMostFixedGroup) {
        const auto columns = with_codes(FixedColumns{data, weight.strides[0]});
        return linear_registers<T>(x, job, RoundedWeight<std::decay_t<decltype(columns)>>{columns});
      }
    }
    linear<T>(x, job, Weight{with_codes(typename Weight::Codes{data, weight.strides[0]})});
  });
  out.release(ret0);
}

XLLM_EXPORT AOTITorchError aoti_torch_cpu_int4_linear(AtenTensorHandle x_handle, AtenTensorHandle weight_handle,
                                                      AtenTensorHandle scale_handle, AtenTensorHandle* bias_handle,
                                                      int64_t out_features, int32_t f32_out, AtenTensorHandle* ret0) {
  return run("int4_linear", [&] {
    const View x("x", x_handle), weight("weight", weight_handle), scale("scale", scale_handle);
    grouped_linear<Int4Codes, false>(x, weight, scale, nullptr, bias_handle, out_features, f32_out, ret0);
  });
}

XLLM_EXPORT AOTITorchError aoti_torch_cpu_int8_zero_linear(AtenTensorHandle x_handle, AtenTensorHandle weight_handle,
                                                           AtenTensorHandle scale_handle, AtenTensorHandle zero_handle,
                                                           AtenTensorHandle* bias_handle, int64_t out_features,
                                                           int32_t f32_out, AtenTensorHandle* ret0) {
  return run("int8_zero_linear", [&] {
    const View x("x", x_handle), weight("weight", weight_handle), scale("scale", scale_handle);
    const View zero("zero", zero_handle);
    grouped_linear<Int8Codes, true>(x, weight, scale, &zero, bias_handle, out_features, f32_out, ret0);
  });
}

XLLM_EXPORT AOTITorchError aoti_torch_cpu_int4_zero_linear(AtenTensorHandle x_handle, AtenTensorHandle weight_handle,
                                                           AtenTensorHandle scale_handle, AtenTensorHandle zero_handle,
                                                           AtenTensorHandle* bias_handle, int64_t out_features,
                                                           int32_t f32_out, AtenTensorHandle* ret0) {
  return run("int4_zero_linear", [&] {
    const View x("x", x_handle), weight("weight", weight_handle), scale("scale", scale_handle);
    const View zero("zero", zero_handle);
    grouped_linear<Int4Codes, true>(x, weight, scale, &zero, bias_handle, out_features, f32_out, ret0);
  });
}
