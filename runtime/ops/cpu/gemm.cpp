// packed_linear: x [T, C] times weights packed in blocks of 32 columns, for one row as for thousands.
#include "linear.h"

using namespace xllm;

XLLM_EXPORT AOTITorchError aoti_torch_cpu_packed_linear(AtenTensorHandle x_handle, AtenTensorHandle weight_handle,
                                                        AtenTensorHandle* bias_handle, int64_t out_features,
                                                        int32_t f32_out, AtenTensorHandle* ret0) {
  return run("packed_linear", [&] {
    const View x("x", x_handle), weight("weight", weight_handle);
    x.expect_dim(2).expect_last_contiguous();
    weight.expect_dtype(x.dtype);
    Product job{};
    if (bias_handle != nullptr) {
      const View bias("bias", *bias_handle);
      bias.expect_dim(1).expect_dtype(x.dtype).expect_size(0, out_features).expect_last_contiguous();
      job.bias = bias.data;
    }
    dispatch(x, [&](auto tag) {
      using T = decltype(tag);
      check_packed<T>(weight, x.sizes[1]);
      check(out_features >= 1, "out_features is %lld, expected at least 1", (long long)out_features);
      weight.expect_size(0, (out_features + kBlockColumns - 1) / kBlockColumns);
      Output out({x.sizes[0], out_features}, f32_out ? aoti_torch_dtype_float32() : x.dtype);
      job.blocks = weight.sizes[0];
      job.steps = weight.sizes[1];
      job.rows = x.sizes[0];
      job.columns = out_features;
      job.f32_out = f32_out != 0;
      job.out = out.ptr<void>();
      linear<T>(x, job, PlainWeight<T>{weight.ptr<const uint32_t>(), weight.strides[0] / kPair<T>});
      out.release(ret0);
    });
  });
}
