// int8_dynamic_linear: x rounded to int8 row by row, int8 weights, sums in int32, which no order changes.
#include <algorithm>
#include <utility>

#include "quantised.h"
#include "quantised_args.h"

namespace xllm {
namespace {

#if defined(XLLM_AVX512) && defined(__AVX512VNNI__)
// vpdpbusd takes one operand without a sign: activations are kept with 128 added, and 128 times the weights' sum is
// taken off again.
constexpr bool kIsOffset = true;
XLLM_INLINE vi add_quads(vi acc, vi row, vi columns) {
  return (vi)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)row, (__m512i)columns);
}
#elif defined(XLLM_AVX512)
constexpr bool kIsOffset = false;
XLLM_INLINE vi add_quads(vi acc, vi row, vi columns) {
  const __m512i a = (__m512i)row, b = (__m512i)columns;
  const __m512i even = _mm512_madd_epi16(_mm512_srai_epi16(_mm512_slli_epi16(a, 8), 8),
                                         _mm512_srai_epi16(_mm512_slli_epi16(b, 8), 8));
  return acc + (vi)even + (vi)_mm512_madd_epi16(_mm512_srai_epi16(a, 8), _mm512_srai_epi16(b, 8));
}
#elif defined(__AVX2__) && defined(__FMA__)
constexpr bool kIsOffset = false;
XLLM_INLINE vi add_quads(vi acc, vi row, vi columns) {
  const __m256i a = (__m256i)row, b = (__m256i)columns;
  const __m256i even = _mm256_madd_epi16(_mm256_srai_epi16(_mm256_slli_epi16(a, 8), 8),
                                         _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8));
  return acc + (vi)even + (vi)_mm256_madd_epi16(_mm256_srai_epi16(a, 8), _mm256_srai_epi16(b, 8));
}
#else
constexpr bool kIsOffset = false;
XLLM_INLINE vi add_quads(vi acc, vi row, vi columns) {
  for (int shift = 24; shift >= 0; shift -= 8) acc += (row << shift >> 24) * (columns << shift >> 24);
  return acc;
}
#endif
constexpr uint32_t kOffset = kIsOffset ? 0x80808080u : 0;

struct DynamicJob : Product {
  const uint8_t* weight;
  int64_t block_bytes;
  // Of the activations: [rows][steps] quads and their scales.
  const uint32_t* quads;
  const float* row_scale;
  int64_t tiles;
};

template <class T, int R>
void block_rows(const DynamicJob& job, int64_t row, int64_t block) {
  for (int64_t sub = 0; sub < kBlockColumns; sub += kTileColumns) {
    vi acc[R][kTileVecs] = {}, offset[kTileVecs] = {};
    const uint8_t* weight = job.weight + block * job.block_bytes + 4 * sub;
    const uint32_t* quads = job.quads + row * job.steps;
    for (int64_t step = 0; step < job.steps; ++step, weight += kStepBytes) {
      __builtin_prefetch(weight + 32 * kStepBytes);
      if (kTileColumns > 16) __builtin_prefetch(weight + 32 * kStepBytes + 64);
      vi columns[kTileVecs];
#pragma GCC unroll 16
      for (int v = 0; v < kTileVecs; ++v) {
        columns[v] = load_raw<vi>(weight + 4 * v * kLanes);
        if (kIsOffset) offset[v] = add_quads(offset[v], vi{} + int32_t(kOffset), columns[v]);
      }
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const vi a = vi{} + int32_t(quads[r * job.steps + step]);
#pragma GCC unroll 16
        for (int v = 0; v < kTileVecs; ++v) acc[r][v] = add_quads(acc[r][v], a, columns[v]);
      }
    }
    vf sums[R][kTileVecs];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
      for (int v = 0; v < kTileVecs; ++v) sums[r][v] = __builtin_convertvector(acc[r][v] - offset[v], vf);
    }
    for (int v = 0; v < kTileVecs; ++v) {
      const int64_t first = block * kBlockColumns + sub + v * kLanes;
      const int64_t count = std::min<int64_t>(job.columns - first, kLanes);
      if (count <= 0) break;
      const Finish finish = finish_of<T>(job, first, count);
      for (int r = 0; r < R; ++r)
        store_results<T>(job, row + r, first, count, finish(sums[r][v] * job.row_scale[row + r]));
    }
  }
}

template <class T, int... I>
auto kernel_for(int64_t rows, std::integer_sequence<int, I...>) {
  static constexpr void (*kTable[])(const DynamicJob&, int64_t, int64_t) = {block_rows<T, I + 1>...};
  return kTable[rows - 1];
}

// One row to int8, filled with zeros to whole quads; returns its scale.
template <class T>
float round_quads(const T* x, int64_t width, uint32_t* quads) {
  int8_t* to = reinterpret_cast<int8_t*>(quads);
  const float scale = round_row(x, width, to);
  const int64_t steps = (width + 3) / 4;
  std::memset(to + width, 0, size_t(4 * steps - width));
  if (kIsOffset)
    for (int64_t step = 0; step < steps; ++step) quads[step] ^= kOffset;
  return scale;
}

template <class T>
void dynamic_linear(const View& x, DynamicJob job) {
  static thread_local Scratch quads, scales;
  uint32_t* packed = quads.get<uint32_t>(size_t(job.rows * job.steps) * 4);
  float* row_scale = scales.get<float>(size_t(job.rows) * 4);
  parallel_for(threads_for(job.rows * x.sizes[1]), job.rows, [&](int64_t row) {
    row_scale[row] = round_quads(x.ptr<const T>() + row * x.strides[0], x.sizes[1], packed + row * job.steps);
  });
  job.quads = packed;
  job.row_scale = row_scale;
  job.tiles = (job.rows + kTileRows - 1) / kTileRows;
  const int threads = threads_for(job.rows * job.steps * job.blocks * 4);
  // Few blocks for the threads: share the row tiles of a block as well.
  const int64_t row_parts = std::min(job.tiles, std::max<int64_t>(1, 4 * threads / job.blocks));
  WorkQueue queue(job.blocks * row_parts);
  parallel(threads, [&](int, int) {
    for (int64_t item; (item = queue.next()) >= 0;) {
      const Span tiles = even_span(job.tiles, row_parts, item % row_parts);
      for (int64_t tile = tiles.begin; tile < tiles.end; ++tile) {
        const Span rows = even_span(job.rows, job.tiles, tile);
        const auto kernel = kernel_for<T>(rows.end - rows.begin, std::make_integer_sequence<int, kTileRows>());
        kernel(job, rows.begin, item / row_parts);
      }
    }
  });
}

}  // namespace
}  // namespace xllm

using namespace xllm;

XLLM_EXPORT AOTITorchError aoti_torch_cpu_int8_dynamic_linear(AtenTensorHandle x_handle,
                                                              AtenTensorHandle weight_handle,
                                                              AtenTensorHandle scale_handle,
                                                              AtenTensorHandle* bias_handle, int64_t out_features,
                                                              int32_t f32_out, AtenTensorHandle* ret0) {
  return run("int8_dynamic_linear", [&] {
    const View x("x", x_handle), weight("weight", weight_handle), scale("scale", scale_handle);
    DynamicJob job{quantised_product(x, weight, bias_handle, out_features, f32_out)};
    check_int8(x, weight, scale, out_features);
    // Sums of 127 * 127 fit an int32.
    check(x.sizes[1] <= (int64_t(1) << 17), "x.shape[1] is %lld, at most 131072 are supported", (long long)x.sizes[1]);
    job.scale = scale.ptr<const float>();
    job.weight = weight.ptr<const uint8_t>();
    job.block_bytes = weight.strides[0];
    job.steps = weight.sizes[1];
    Output out({job.rows, job.columns}, f32_out ? aoti_torch_dtype_float32() : x.dtype);
    job.out = out.ptr<void>();
    dispatch(x, [&](auto tag) {
      if (job.rows > 0) dynamic_linear<decltype(tag)>(x, job);
    });
    out.release(ret0);
  });
}
