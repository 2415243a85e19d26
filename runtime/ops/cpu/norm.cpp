// rms_norm, add_rms_norm, silu_mul: one pass over memory, float32 inside, rounded once.
#include "norm.h"
#include "shim_util.h"

namespace xllm {
namespace {

template <class T>
void rms_norm(const View& x, const View& weight, double eps, T* out) {
  const int64_t width = x.sizes[x.dim - 1];
  const int64_t rows = width > 0 ? x.numel() / width : 0;
  const int threads = threads_for(x.numel());
  parallel_for(threads, rows, [&](int64_t row) {
    const T* in = x.ptr<const T>() + x.row_offset(row);
    scale_row(in, weight.ptr<const T>(), inverse_rms(in, width, float(eps)), width, out + row * width);
  });
}

template <class T>
void add_rms_norm(const View& x, const View& residual, const View& weight, double eps, T* out, T* total) {
  const int64_t width = x.sizes[x.dim - 1];
  const int64_t rows = width > 0 ? x.numel() / width : 0;
  const int threads = threads_for(x.numel());
  parallel_for(threads, rows, [&](int64_t row) {
    const T* a = x.ptr<const T>() + x.row_offset(row);
    const T* b = residual.ptr<const T>() + residual.row_offset(row);
    T* sum_row = total + row * width;
    for_vectors(width, [&](int64_t i, int64_t n) { store_n(sum_row + i, load_n(a + i, n) + load_n(b + i, n), n); });
    scale_row(sum_row, weight.ptr<const T>(), inverse_rms(sum_row, width, float(eps)), width, out + row * width);
  });
}

template <class T>
void silu_mul(const View& gate_up, T* out) {
  const int64_t width = gate_up.sizes[gate_up.dim - 1] / 2;
  const int64_t rows = width > 0 ? gate_up.numel() / (2 * width) : 0;
  // Split the columns too: one row of a decode step is enough work for several cores.
  const int64_t span = 2048;
  const int64_t spans = (width + span - 1) / span;
  const int threads = threads_for(rows * width * 4);
  parallel_for(threads, rows * spans, [&](int64_t item) {
    const int64_t row = item / spans, first = item % spans * span;
    const T* gate = gate_up.ptr<const T>() + gate_up.row_offset(row) + first;
    T* to = out + row * width + first;
    for_vectors(width - first < span ? width - first : span, [&](int64_t i, int64_t n) {
      const vf g = load_n(gate + i, n);
      // exp stays below 2^126 where the sigmoid is not zero already.
      store_n(to + i, g * reciprocal(1.0f + exp(-g)) * load_n(gate + width + i, n), n);
    });
  });
}

void check_norm(const View& x, const View& weight) {
  x.expect_last_contiguous();
  weight.expect_dim(1).expect_dtype(x.dtype).expect_size(0, x.sizes[x.dim - 1]).expect_last_contiguous();
}

}  // namespace
}  // namespace xllm

using namespace xllm;

XLLM_EXPORT AOTITorchError aoti_torch_cpu_rms_norm(AtenTensorHandle x_handle, AtenTensorHandle weight_handle,
                                                   double eps, AtenTensorHandle* ret0) {
  return run("rms_norm", [&] {
    const View x("x", x_handle), weight("weight", weight_handle);
    check_norm(x, weight);
    Output out(x, x.dtype);
    dispatch(x, [&](auto tag) { xllm::rms_norm(x, weight, eps, out.ptr<decltype(tag)>()); });
    out.release(ret0);
  });
}

XLLM_EXPORT AOTITorchError aoti_torch_cpu_add_rms_norm(AtenTensorHandle x_handle, AtenTensorHandle residual_handle,
                                                       AtenTensorHandle weight_handle, double eps,
                                                       AtenTensorHandle* ret0, AtenTensorHandle* ret1) {
  return run("add_rms_norm", [&] {
    const View x("x", x_handle), residual("residual", residual_handle), weight("weight", weight_handle);
    check_norm(x, weight);
    residual.expect_dim(x.dim).expect_dtype(x.dtype).expect_last_contiguous();
    for (int64_t axis = 0; axis < x.dim; ++axis) residual.expect_size(axis, x.sizes[axis]);
    Output out(x, x.dtype), total(x, x.dtype);
    dispatch(x, [&](auto tag) {
      using T = decltype(tag);
      xllm::add_rms_norm(x, residual, weight, eps, out.ptr<T>(), total.ptr<T>());
    });
    out.release(ret0);
    total.release(ret1);
  });
}

XLLM_EXPORT AOTITorchError aoti_torch_cpu_silu_mul(AtenTensorHandle gate_up_handle, AtenTensorHandle* ret0) {
  return run("silu_mul", [&] {
    View gate_up("gate_up", gate_up_handle);
    gate_up.expect_last_contiguous();
    const int64_t width = gate_up.sizes[gate_up.dim - 1];
    check(width % 2 == 0, "the last axis of gate_up is %lld, expected an even size", (long long)width);
    check(gate_up.dim <= 8, "gate_up has %lld dimensions, at most 8 are supported", (long long)gate_up.dim);
    int64_t sizes[8];
    for (int64_t i = 0; i < gate_up.dim; ++i) sizes[i] = i + 1 == gate_up.dim ? width / 2 : gate_up.sizes[i];
    View shape = gate_up;
    shape.sizes = sizes;
    Output out(shape, gate_up.dtype);
    dispatch(gate_up, [&](auto tag) { xllm::silu_mul(gate_up, out.ptr<decltype(tag)>()); });
    out.release(ret0);
  });
}
