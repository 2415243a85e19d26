// rope, kv_write, and their fusion with the head norms: qkv_rope_write.
#include "int8_codes.h"
#include "norm.h"
#include "shim_util.h"
#include "step.h"

namespace xllm {
namespace {

constexpr int64_t kMaxHeadDim = 1024;

// Rotates one head held as float32 and rounds it to its destination.
template <class T>
void rotate(const float* x, const float* cos, const float* sin, int64_t half, int64_t width, T* out) {
  for_vectors(half, [&](int64_t i, int64_t n) {
    const vf first = load_n(x + i, n), second = load_n(x + half + i, n);
    const vf c = load_n(cos + i, n), s = load_n(sin + i, n);
    store_n(out + i, first * c - second * s, n);
    store_n(out + half + i, second * c + first * s, n);
  });
  for_vectors(width - 2 * half, [&](int64_t i, int64_t n) {
    store_n(out + 2 * half + i, load_n(x + 2 * half + i, n), n);
  });
}

// The norm is rounded to T before the rotation, as in the unfused sequence of operators.
template <class T>
void norm_rotate(const T* x, const T* weight, float eps, const float* cos, const float* sin, int64_t half,
                 int64_t width, T* out) {
  float buffer[kMaxHeadDim];
  const T* rounded = x;
  T normed[kMaxHeadDim];
  if (weight != nullptr) {
    scale_row(x, weight, inverse_rms(x, width, eps), width, normed);
    rounded = normed;
  }
  for_vectors(width, [&](int64_t i, int64_t n) { store_n(buffer + i, load_n(rounded + i, n), n); });
  rotate(buffer, cos, sin, half, width, out);
}

// Rounds a head to a row of an int8 cache.
template <class T>
void round_head(const Cache& cache, const T* head, int8_t* row) {
  const float scale = round_row(head, cache.head_dim, row);
  std::memcpy(row + cache.head_dim, &scale, kScaleBytes);
}

struct Angles {
  const float *cos, *sin;
  int64_t cos_stride, sin_stride, half;

  Angles(const View& c, const View& s, int64_t tokens, int64_t head_dim) {
    for (const View* view : {&c, &s})
      view->expect_dim(2).expect_dtype(aoti_torch_dtype_float32()).expect_size(0, tokens).expect_last_contiguous();
    s.expect_size(1, c.sizes[1]);
    half = c.sizes[1];
    check(2 * half <= head_dim, "cos rotates %lld of %lld head elements", (long long)(2 * half), (long long)head_dim);
    cos = c.ptr<const float>();
    sin = s.ptr<const float>();
    cos_stride = c.strides[0];
    sin_stride = s.strides[0];
  }
};

void check_head_dim(int64_t head_dim) {
  check(head_dim >= 1 && head_dim <= kMaxHeadDim, "head size %lld, 1 to %lld are supported", (long long)head_dim,
        (long long)kMaxHeadDim);
}

template <class T>
void rope(const View& x, const Angles& angles, T* out) {
  const int64_t heads = x.sizes[1], width = x.sizes[2];
  const int threads = threads_for(x.numel());
  parallel_for(threads, x.sizes[0], [&](int64_t token) {
    for (int64_t head = 0; head < heads; ++head)
      norm_rotate<T>(x.ptr<const T>() + token * x.strides[0] + head * x.strides[1], nullptr, 0.0f,
                     angles.cos + token * angles.cos_stride, angles.sin + token * angles.sin_stride, angles.half, width,
                     out + (token * heads + head) * width);
  });
}

}  // namespace
}  // namespace xllm

using namespace xllm;

XLLM_EXPORT AOTITorchError aoti_torch_cpu_rope(AtenTensorHandle x_handle, AtenTensorHandle cos_handle,
                                               AtenTensorHandle sin_handle, AtenTensorHandle* ret0) {
  return run("rope", [&] {
    const View x("x", x_handle);
    x.expect_dim(3).expect_last_contiguous();
    check_head_dim(x.sizes[2]);
    const Angles angles(View("cos", cos_handle), View("sin", sin_handle), x.sizes[0], x.sizes[2]);
    Output out(x, x.dtype);
    dispatch(x, [&](auto tag) { xllm::rope(x, angles, out.ptr<decltype(tag)>()); });
    out.release(ret0);
  });
}

XLLM_EXPORT AOTITorchError aoti_torch_cpu_kv_write(AtenTensorHandle k_handle, AtenTensorHandle v_handle,
                                                   AtenTensorHandle cache_handle, AtenTensorHandle positions_handle,
                                                   AtenTensorHandle seq_start_handle, AtenTensorHandle slot_handle) {
  return run("kv_write", [&] {
    const View k("k", k_handle), v("v", v_handle);
    const Cache cache(View("kv_cache", cache_handle));
    for (const View* view : {&k, &v})
      cache.expect_kind_of(*view)
          .expect_dim(3)
          .expect_dtype(k.dtype)
          .expect_size(0, k.sizes[0])
          .expect_size(1, cache.heads)
          .expect_size(2, cache.head_dim)
          .expect_last_contiguous();
    const Step step(k.sizes[0], View("seq_start", seq_start_handle), View("slot", slot_handle), cache);
    const Ints positions(View("positions", positions_handle));
    step.check_positions(positions, cache);
    dispatch(k, [&](auto tag) {
      using T = decltype(tag);
      for (int64_t token = 0; token < step.tokens(); ++token) {
        const int64_t slot = step.slot_of(token);
        for (int64_t head = 0; head < cache.heads; ++head) {
          const T* key = k.ptr<const T>() + token * k.strides[0] + head * k.strides[1];
          const T* value = v.ptr<const T>() + token * v.strides[0] + head * v.strides[1];
          if (cache.is_int8) {
            round_head(cache, key, cache.key<int8_t>(slot, positions[token], head));
            round_head(cache, value, cache.value<int8_t>(slot, positions[token], head));
          } else {
            std::memcpy(cache.key<T>(slot, positions[token], head), key, cache.head_dim * sizeof(T));
            std::memcpy(cache.value<T>(slot, positions[token], head), value, cache.head_dim * sizeof(T));
          }
        }
      }
    });
  });
}

XLLM_EXPORT AOTITorchError aoti_torch_cpu_qkv_rope_write(
    AtenTensorHandle qkv_handle, AtenTensorHandle* q_norm_handle, AtenTensorHandle* k_norm_handle,
    AtenTensorHandle cos_handle, AtenTensorHandle sin_handle, AtenTensorHandle cache_handle,
    AtenTensorHandle positions_handle, AtenTensorHandle seq_start_handle, AtenTensorHandle slot_handle,
    int64_t num_heads, int64_t num_kv_heads, double eps, AtenTensorHandle* ret0) {
  return run("qkv_rope_write", [&] {
    const View qkv("qkv", qkv_handle);
    const Cache cache(View("kv_cache", cache_handle));
    cache.expect_kind_of(qkv).expect_dim(2).expect_last_contiguous();
    check(num_heads >= 1 && num_kv_heads == cache.heads, "num_heads=%lld num_kv_heads=%lld, the cache has %lld heads",
          (long long)num_heads, (long long)num_kv_heads, (long long)cache.heads);
    const int64_t tokens = qkv.sizes[0], width = cache.head_dim;
    check_head_dim(width);
    qkv.expect_size(1, (num_heads + 2 * num_kv_heads) * width);
    const Angles angles(View("cos", cos_handle), View("sin", sin_handle), tokens, width);
    const Step step(tokens, View("seq_start", seq_start_handle), View("slot", slot_handle), cache);
    const Ints positions(View("positions", positions_handle));
    step.check_positions(positions, cache);
    const void* norms[2] = {nullptr, nullptr};
    AtenTensorHandle* const norm_handles[2] = {q_norm_handle, k_norm_handle};
    for (int i = 0; i < 2; ++i) {
      if (norm_handles[i] == nullptr) continue;
      const View weight(i == 0 ? "q_norm" : "k_norm", *norm_handles[i]);
      weight.expect_dim(1).expect_dtype(qkv.dtype).expect_size(0, width).expect_last_contiguous();
      norms[i] = weight.data;
    }
    Output out({tokens, num_heads, width}, qkv.dtype);
    dispatch(qkv, [&](auto tag) {
      using T = decltype(tag);
      const T* q_norm = static_cast<const T*>(norms[0]);
      const T* k_norm = static_cast<const T*>(norms[1]);
      T* rotated = out.ptr<T>();
      const int threads = threads_for(tokens * qkv.sizes[1]);
      parallel_for(threads, tokens, [&](int64_t token) {
        const T* row = qkv.ptr<const T>() + token * qkv.strides[0];
        const float* cos = angles.cos + token * angles.cos_stride;
        const float* sin = angles.sin + token * angles.sin_stride;
        for (int64_t head = 0; head < num_heads; ++head)
          norm_rotate(row + head * width, q_norm, float(eps), cos, sin, angles.half, width,
                      rotated + (token * num_heads + head) * width);
        if (token >= step.tokens()) return;
        const int64_t slot = step.slot_of(token), position = positions[token];
        const T* keys = row + num_heads * width;
        const T* values = keys + num_kv_heads * width;
        for (int64_t head = 0; head < num_kv_heads; ++head) {
          T rotated_key[kMaxHeadDim];
          T* key = cache.is_int8 ? rotated_key : cache.key<T>(slot, position, head);
          norm_rotate(keys + head * width, k_norm, float(eps), cos, sin, angles.half, width, key);
          if (cache.is_int8) {
            round_head(cache, key, cache.key<int8_t>(slot, position, head));
            round_head(cache, values + head * width, cache.value<int8_t>(slot, position, head));
          } else {
            std::memcpy(cache.value<T>(slot, position, head), values + head * width, width * sizeof(T));
          }
        }
      });
    });
    out.release(ret0);
  });
}
