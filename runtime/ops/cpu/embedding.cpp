// packed_embedding: rows of a weight in the packed layout of packed_linear (a tied embedding is held once).
//
// A row is strided: one unit out of every 32. The lines it touches are independent, so the loads overlap.
#include "packed.h"

namespace xllm {
namespace {

template <class T>
void gather(const int64_t* ids, int64_t count, const View& weight, int64_t columns, T* out) {
  const int threads = threads_for(count * columns);
  parallel_for(threads, count, [&](int64_t i) {
    const int64_t block = ids[i] / kBlockColumns, column = ids[i] % kBlockColumns;
    const T* row = weight.ptr<const T>() + block * weight.strides[0] + column * kPair<T>;
    for (int64_t c = 0; c < columns; ++c)
      out[i * columns + c] = row[c / kPair<T> * kBlockColumns * kPair<T> + c % kPair<T>];
  });
}

}  // namespace
}  // namespace xllm

using namespace xllm;

XLLM_EXPORT AOTITorchError aoti_torch_cpu_packed_embedding(AtenTensorHandle ids_handle, AtenTensorHandle weight_handle,
                                                           int64_t columns, AtenTensorHandle* ret0) {
  return run("packed_embedding", [&] {
    const View ids("token_ids", ids_handle), weight("weight", weight_handle);
    ids.expect_dim(1);
    const bool wide = ids.dtype == aoti_torch_dtype_int64();
    check(wide || ids.dtype == aoti_torch_dtype_int32(), "token_ids has dtype code %d, int32 and int64 are supported",
          int(ids.dtype));
    dispatch(weight, [&](auto tag) {
      using T = decltype(tag);
      check_packed<T>(weight, columns);
      const int64_t count = ids.sizes[0], limit = weight.sizes[0] * kBlockColumns;
      static thread_local Scratch scratch;
      int64_t* rows = scratch.get<int64_t>(size_t(count) * 8 + 8);
      for (int64_t i = 0; i < count; ++i) {
        rows[i] = wide ? ids.ptr<const int64_t>()[i * ids.strides[0]] : ids.ptr<const int32_t>()[i * ids.strides[0]];
        check(rows[i] >= 0 && rows[i] < limit, "token_ids[%lld] is %lld, the weight has %lld rows", (long long)i,
              (long long)rows[i], (long long)limit);
      }
      Output out({count, columns}, weight.dtype);
      gather(rows, count, weight, columns, out.ptr<T>());
      out.release(ret0);
    });
  });
}
