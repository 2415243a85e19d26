// packed_embedding and int8_embedding: rows of a weight in the layout of packed_linear or int8_linear (a tied embedding is
// held once).
//
// A row is strided: 4 bytes of every 128. The lines it touches are independent, so the loads overlap.
#include <type_traits>

#include "packed.h"
#include "quantised_args.h"

namespace xllm {
namespace {

// Rows of the weight to gather, checked.
struct Rows {
  Rows(const View& ids, const View& weight) {
    ids.expect_dim(1);
    const bool wide = ids.dtype == aoti_torch_dtype_int64();
    check(wide || ids.dtype == aoti_torch_dtype_int32(), "token_ids has dtype code %d, int32 and int64 are supported",
          int(ids.dtype));
    const int64_t limit = weight.sizes[0] * kBlockColumns;
    count = ids.sizes[0];
    static thread_local Scratch scratch;
    int64_t* rows = scratch.get<int64_t>(size_t(count) * 8 + 8);
    for (int64_t i = 0; i < count; ++i) {
      rows[i] = wide ? ids.ptr<const int64_t>()[i * ids.strides[0]] : ids.ptr<const int32_t>()[i * ids.strides[0]];
      check(rows[i] >= 0 && rows[i] < limit, "token_ids[%lld] is %lld, the weight has %lld rows", (long long)i,
            (long long)rows[i], (long long)limit);
    }
    at = rows;
  }
  // Calls body(i, block, column) for row number i of the result.
  template <class F>
  void gather(int64_t columns, F body) const {
    parallel_for(threads_for(count * columns), count,
                 [&](int64_t i) { body(i, at[i] / kBlockColumns, at[i] % kBlockColumns); });
  }
  int64_t count;
  const int64_t* at;
};

}  // namespace
}  // namespace xllm

using namespace xllm;

XLLM_EXPORT AOTITorchError aoti_torch_cpu_packed_embedding(AtenTensorHandle ids_handle, AtenTensorHandle weight_handle,
                                                           int64_t columns, AtenTensorHandle* ret0) {
  return run("packed_embedding", [&] {
    const View ids("token_ids", ids_handle), weight("weight", weight_handle);
    dispatch(weight, [&](auto tag) {
      using T = decltype(tag);
      check_packed<T>(weight, columns);
      const Rows rows(ids, weight);
      Output out({rows.count, columns}, weight.dtype);
      T* to = out.ptr<T>();
      rows.gather(columns, [&](int64_t i, int64_t block, int64_t column) {
        const T* from = weight.ptr<const T>() + block * weight.strides[0] + column * kPair<T>;
        for (int64_t c = 0; c < columns; ++c)
          to[i * columns + c] = from[c / kPair<T> * kBlockColumns * kPair<T> + c % kPair<T>];
      });
      out.release(ret0);
    });
  });
}

XLLM_EXPORT AOTITorchError aoti_torch_cpu_int8_embedding(AtenTensorHandle ids_handle, AtenTensorHandle weight_handle,
                                                         AtenTensorHandle scale_handle, int64_t columns,
                                                         int32_t f32_out, AtenTensorHandle* ret0) {
  return run("int8_embedding", [&] {
    const View ids("token_ids", ids_handle), weight("weight", weight_handle), scale("scale", scale_handle);
    weight.expect_dtype(aoti_torch_dtype_int8()).expect_dim(4);
    check_steps(weight, (columns + 3) / 4);
    scale.expect_dtype(aoti_torch_dtype_float32()).expect_dim(1).expect_last_contiguous();
    const Rows rows(ids, weight);
    for (int64_t i = 0; i < rows.count; ++i)
      check(rows.at[i] < scale.sizes[0], "token_ids[%lld] is %lld, there are %lld scales", (long long)i,
            (long long)rows.at[i], (long long)scale.sizes[0]);
    const auto write = [&](auto* to) {
      using T = std::remove_pointer_t<decltype(to)>;
      rows.gather(columns, [&](int64_t i, int64_t block, int64_t column) {
        const int8_t* from = weight.ptr<const int8_t>() + block * weight.strides[0] + column * 4;
        const float step = scale.ptr<const float>()[rows.at[i]];
        for (int64_t c = 0; c < columns; ++c)
          to[i * columns + c] = from_float<T>(from[c / 4 * kBlockColumns * 4 + c % 4] * step);
      });
    };
    Output out({rows.count, columns}, f32_out ? aoti_torch_dtype_float32() : aoti_torch_dtype_bfloat16());
    if (f32_out)
      write(out.ptr<float>());
    else
      write(out.ptr<bf16>());
    out.release(ret0);
  });
}
