// What every entry point needs from the AOTInductor C shim: tensor views, checks, outputs, scratch memory.
//
// Entry points return an error code and never throw across the C ABI: run() turns a failed check into a message on
// stderr (compiled graphs only see the code) and in xllm_last_error() (read by the Python binding).
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "parallel.h"
#include "vec.h"

#define XLLM_EXPORT extern "C" __attribute__((visibility("default")))

namespace xllm {

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

__attribute__((format(printf, 2, 3))) inline void check(bool ok, const char* format, ...) {
  if (ok) return;
  char text[512];
  va_list args;
  va_start(args, format);
  std::vsnprintf(text, sizeof(text), format, args);
  va_end(args);
  throw Failure(text);
}

void set_last_error(const char* op, const char* text);

template <class F>
AOTITorchError run(const char* op, F body) {
  try {
    body();
    return AOTI_TORCH_SUCCESS;
  } catch (const std::exception& error) {
    set_last_error(op, error.what());
  } catch (...) {
    set_last_error(op, "unknown error");
  }
  return AOTI_TORCH_FAILURE;
}

inline void check_shim(AOTITorchError code, const char* what) { check(code == AOTI_TORCH_SUCCESS, "%s failed", what); }

struct View {
  const char* name;
  void* data = nullptr;
  int32_t dtype = 0;
  int64_t dim = 0;
  int64_t* sizes = nullptr;
  int64_t* strides = nullptr;

  View(const char* view_name, AtenTensorHandle handle) : name(view_name) {
    check(handle != nullptr, "%s is missing", name);
    check_shim(aoti_torch_get_data_ptr(handle, &data), "aoti_torch_get_data_ptr");
    check_shim(aoti_torch_get_dtype(handle, &dtype), "aoti_torch_get_dtype");
    check_shim(aoti_torch_get_dim(handle, &dim), "aoti_torch_get_dim");
    check_shim(aoti_torch_get_sizes(handle, &sizes), "aoti_torch_get_sizes");
    check_shim(aoti_torch_get_strides(handle, &strides), "aoti_torch_get_strides");
  }
  template <class T>
  T* ptr() const {
    return static_cast<T*>(data);
  }
  const View& expect_dim(int64_t want) const {
    check(dim == want, "%s has %lld dimensions, expected %lld", name, (long long)dim, (long long)want);
    return *this;
  }
  const View& expect_size(int64_t axis, int64_t want) const {
    check(sizes[axis] == want, "%s.shape[%lld] is %lld, expected %lld", name, (long long)axis, (long long)sizes[axis],
          (long long)want);
    return *this;
  }
  const View& expect_dtype(int32_t want) const {
    check(dtype == want, "%s has dtype code %d, expected %d", name, int(dtype), int(want));
    return *this;
  }
  const View& expect_last_contiguous() const {
    check(dim > 0 && (strides[dim - 1] == 1 || sizes[dim - 1] <= 1), "the last axis of %s has stride %lld, expected 1",
          name, dim > 0 ? (long long)strides[dim - 1] : 0LL);
    return *this;
  }
  int64_t numel() const {
    int64_t n = 1;
    for (int64_t i = 0; i < dim; ++i) n *= sizes[i];
    return n;
  }
  // Element offset of row `index` when all axes but the last are flattened.
  int64_t row_offset(int64_t index) const {
    int64_t offset = 0;
    for (int64_t axis = dim - 2; axis >= 0; --axis) {
      offset += index % sizes[axis] * strides[axis];
      index /= sizes[axis];
    }
    return offset;
  }
};

// A 1-D int32 tensor with any stride.
struct Ints {
  const int32_t* data;
  int64_t stride, size;
  explicit Ints(const View& view) {
    view.expect_dim(1).expect_dtype(aoti_torch_dtype_int32());
    data = view.ptr<const int32_t>();
    stride = view.strides[0];
    size = view.sizes[0];
  }
  int64_t operator[](int64_t i) const { return data[i * stride]; }
};

// A contiguous output; freed again unless the entry point hands it over with release().
class Output {
 public:
  Output(std::initializer_list<int64_t> shape, int32_t dtype) { allocate(shape.begin(), int64_t(shape.size()), dtype); }
  Output(const View& like, int32_t dtype) { allocate(like.sizes, like.dim, dtype); }
  Output(const Output&) = delete;
  Output& operator=(const Output&) = delete;
  ~Output() {
    if (handle_) aoti_torch_delete_tensor_object(handle_);
  }
  template <class T>
  T* ptr() const {
    return static_cast<T*>(data_);
  }
  void release(AtenTensorHandle* to) {
    *to = handle_;
    handle_ = nullptr;
  }

 private:
  void allocate(const int64_t* sizes, int64_t dim, int32_t dtype) {
    check(dim >= 1 && dim <= 8, "%lld dimensions, 1 to 8 are supported", (long long)dim);
    int64_t strides[8];
    int64_t step = 1;
    for (int64_t i = dim - 1; i >= 0; --i) {
      strides[i] = step;
      step *= sizes[i] > 0 ? sizes[i] : 1;
    }
    check_shim(aoti_torch_empty_strided(dim, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &handle_),
               "aoti_torch_empty_strided");
    check_shim(aoti_torch_get_data_ptr(handle_, &data_), "aoti_torch_get_data_ptr");
  }
  AtenTensorHandle handle_ = nullptr;
  void* data_ = nullptr;
};

// Calls body(T{}) with the element type of the tensor.
template <class F>
void dispatch(const View& view, F body) {
  if (view.dtype == aoti_torch_dtype_bfloat16())
    body(bf16{});
  else if (view.dtype == aoti_torch_dtype_float32())
    body(float{});
  else
    check(false, "%s has dtype code %d, float32 and bfloat16 are supported", view.name, int(view.dtype));
}

// Memory that outlives a call, so that steps do not pay for page faults: one block per calling thread and use.
class Scratch {
 public:
  ~Scratch() { std::free(data_); }
  template <class T>
  T* get(size_t bytes) {
    if (bytes > size_) {
      std::free(data_);
      size_ = 0;
      data_ = std::aligned_alloc(64, (bytes + 4095) / 4096 * 4096);
      check(data_ != nullptr, "no memory for %zu scratch bytes", bytes);
      size_ = (bytes + 4095) / 4096 * 4096;
    }
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

// Threads worth waking for `work` elements. A region costs a few microseconds on an idle machine, but a scheduler slice
// when a share lands on a core that another process holds: worth risking for some 50 us of work, not for less.
inline int threads_for(int64_t work) { return work < (int64_t(1) << 16) ? 1 : max_threads(); }

}  // namespace xllm
