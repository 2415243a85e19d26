// The machine's own limits, measured with the same vector types and threads as the kernels: what a rate is a share of.
#include <chrono>
#include <vector>

#include "amx.h"
#include "shim_util.h"
#include "tile.h"

namespace xllm {
namespace {

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Sums `bytes` of memory in one pass, the way a weight stream is read: nothing but loads and adds.
double read_pass(const char* data, int64_t bytes, uint64_t* sink) {
  const double start = now();
  std::vector<uint64_t> totals(max_threads());
  parallel(max_threads(), [&](int thread, int threads) {
    const Span share = even_span(bytes / 4096, threads, thread);
    vu sums[8] = {};
    for (const char *p = data + share.begin * 4096, *end = data + share.end * 4096; p < end; p += sizeof(sums))
      for (int i = 0; i < 8; ++i) sums[i] += load_raw<vu>(p + i * sizeof(vu));
    for (int i = 1; i < 8; ++i) sums[0] += sums[i];
    totals[thread] = sums[0][0];
  });
  *sink = 0;
  for (const uint64_t total : totals) *sink += total;
  return now() - start;
}

// Multiply-adds on registers only. Returns seconds; every thread does `steps` x 16 vectors.
template <class T>
double multiply_pass(int64_t steps, float* sink) {
  const double start = now();
  std::vector<float> totals(max_threads());
  const uint32_t one = kPair<T> == 2 ? 0x3f803f80u : 0x3f800000u;
  parallel(max_threads(), [&](int thread, int) {
    // Different starts keep the compiler from computing one accumulator for all.
    vf acc[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) acc[i] = splat(float(i));
    auto a = Dot<T>::broadcast(&one), b = Dot<T>::broadcast(&one);
    for (int64_t k = 0; k < steps; ++k) {
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) acc[i] = Dot<T>::add(acc[i], a, b);
      // Keeps the compiler from summing the steps up in advance.
      asm volatile("");
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) totals[thread] += acc[i][0];
  });
  *sink = 0;
  for (const float total : totals) *sink += total;
  return now() - start;
}

#if defined(XLLM_AMX)
// The same on AMX tiles: every thread does `steps` x 4 tile products.
double tile_pass(int64_t steps) {
  require_tiles();
  const double start = now();
  parallel(max_threads(), [&](int, int) {
    configure_tiles(kTileSide, kTileSide);
    for (int64_t k = 0; k < steps; ++k) {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_release();
  });
  return now() - start;
}
#endif

}  // namespace
}  // namespace xllm

// Bytes per second of one pass over `bytes` (rounded down to pages) at `data`.
XLLM_EXPORT double xllm_measure_read(const void* data, int64_t bytes) {
  static volatile uint64_t sink;
  uint64_t total;
  const double seconds = xllm::read_pass(static_cast<const char*>(data), bytes, &total);
  sink = total;
  return double(bytes / 4096 * 4096) / seconds;
}

// Floating-point operations per second (a multiply-add is two) of the float32 or bfloat16 dot products.
XLLM_EXPORT double xllm_measure_multiply(int32_t bfloat16, int64_t steps) {
#if defined(XLLM_AMX)
  if (bfloat16) {
    constexpr int64_t kWork = 4 * 2 * xllm::kTileSide * xllm::kTileSide * 2 * xllm::kTileUnits;
    const int64_t tile_steps = steps / 16;
    return double(tile_steps) * kWork * xllm::max_threads() / xllm::tile_pass(tile_steps);
  }
#endif
  static volatile float sink;
  float total;
  const double seconds =
      bfloat16 ? xllm::multiply_pass<xllm::bf16>(steps, &total) : xllm::multiply_pass<float>(steps, &total);
  sink = total;
  return double(steps) * 16 * xllm::kLanes * (bfloat16 ? 4 : 2) * xllm::max_threads() / seconds;
}
