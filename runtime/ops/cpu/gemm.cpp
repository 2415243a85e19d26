// packed_linear: x [T, C] times weights packed in blocks of 32 columns, for one row as for thousands.
//
// Rows are packed into tiles of at most kTileRows, [unit][row], once per call. Work items are (group of column blocks,
// range of row tiles): the group stays in L2 while the row tiles pass over it, and with one tile the weights are
// streamed once. The whole reduction axis runs in registers, so there is one rounding order for every tile height.
// Where the CPU has AMX, bfloat16 goes to the tiles of gemm_amx.h instead.
#include <utility>

#include "gemm.h"
#include "gemm_amx.h"
#include "shim_util.h"

namespace xllm {
namespace {

constexpr int64_t kSubTiles = kBlockColumns / kTileColumns;
// Bytes of weights a group of blocks may hold: a share of L2 that leaves room for row tiles.
constexpr int64_t kGroupBytes = 256 * 1024;

struct Job : Product {
  const uint32_t* packed;
  int64_t tiles;
};

template <class T, int R, int NB>
void block_tile(const Job& job, const uint32_t* a, int64_t row, int64_t block) {
  // Tiles of few rows are bound by memory: prefetch 48 steps (6 KiB) ahead, 1.05 of the rate of 12 steps in paired
  // runs. From 5 rows on it costs what it gains (0.95 at 8 rows).
  constexpr int kAhead = R <= 4 ? kBlockColumns * 48 : 0;
  for (int64_t sub = 0; sub < kSubTiles; ++sub) {
    vf acc[R][NB * kTileVecs] = {};
    multiply<T, R, NB, kAhead>(a, 1, R, job.weight + block * job.block_stride + sub * kTileColumns, kBlockColumns,
                               job.block_stride, job.steps, acc);
    // Copied with constant indices: an accumulator that is indexed by a loop would live in memory, not in a register.
    vf result[R][NB * kTileVecs];
    unrolled_copy(acc, result);
    for (int n = 0; n < NB; ++n) {
      const int64_t column = (block + n) * kBlockColumns + sub * kTileColumns;
      for (int v = 0; v < kTileVecs; ++v) {
        const int64_t first = column + v * kLanes;
        const int64_t count = job.columns - first < kLanes ? job.columns - first : kLanes;
        if (count <= 0) break;
        const vf bias = job.bias ? load_n(static_cast<const T*>(job.bias) + first, count) : vf{};
        for (int r = 0; r < R; ++r) {
          const vf y = result[r][n * kTileVecs + v] + bias;
          store_results<T>(job, row + r, first, count, y);
        }
      }
    }
  }
}

template <class T, int R>
void tile_columns(const Job& job, const uint32_t* a, int64_t row, int64_t begin, int64_t end) {
  int64_t block = begin;
  for (; block + kWide<R> <= end; block += kWide<R>) block_tile<T, R, kWide<R>>(job, a, row, block);
  for (; block < end; ++block) block_tile<T, R, 1>(job, a, row, block);
}

using TileColumns = void (*)(const Job&, const uint32_t*, int64_t, int64_t, int64_t);

template <class T, int... I>
TileColumns kernel_for(int64_t rows, std::integer_sequence<int, I...>) {
  static constexpr TileColumns kTable[] = {tile_columns<T, I + 1>...};
  return kTable[rows - 1];
}

template <class T>
void run_item(const Job& job, int64_t block_begin, int64_t block_end, int64_t tile_begin, int64_t tile_end) {
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    const Span rows = even_span(job.rows, job.tiles, tile);
    const auto kernel = kernel_for<T>(rows.end - rows.begin, std::make_integer_sequence<int, kTileRows>());
    kernel(job, job.packed + rows.begin * job.steps, rows.begin, block_begin, block_end);
  }
}

template <class T>
void pack_tile(const View& x, const Job& job, int64_t tile, uint32_t* packed) {
  const Span span = even_span(job.rows, job.tiles, tile);
  const int count = int(span.end - span.begin);
  const T* rows[kTileRows];
  for (int r = 0; r < count; ++r) rows[r] = x.ptr<const T>() + (span.begin + r) * x.strides[0];
  transpose_units(rows, count, x.sizes[1], packed + span.begin * job.steps, count);
}

template <class T>
void linear(const View& x, Job job) {
  const bool direct = job.rows == 1 && x.sizes[1] % kPair<T> == 0;
  static thread_local Scratch scratch;
  uint32_t* packed = direct ? nullptr : scratch.get<uint32_t>(size_t(job.rows * job.steps) * 4);
  job.packed = direct ? x.ptr<const uint32_t>() : packed;

  const int threads = threads_for(job.rows * job.steps * job.blocks * 4);
  const int64_t block_bytes = job.steps * kBlockColumns * 4;
  // One tile reads a group once: as many blocks as it takes together, so that no thread ends much later than another.
  const int64_t wanted = job.tiles == 1 ? (job.rows <= 4 ? 4 : 1) : std::max<int64_t>(1, kGroupBytes / block_bytes);
  const int64_t group = std::max<int64_t>(1, std::min(wanted, job.blocks / (2 * threads)));
  const int64_t groups = (job.blocks + group - 1) / group;
  // Few column groups for the threads: share the row tiles of a group as well.
  const int64_t row_parts = std::min(job.tiles, std::max<int64_t>(1, 4 * threads / groups));
  const int64_t items = groups * row_parts;

  const auto pack = [&](int64_t tile) { pack_tile<T>(x, job, tile, packed); };
  if (!direct) parallel_for(job.tiles > 1 ? threads : 1, job.tiles, pack);
  WorkQueue queue(items);
  parallel(threads, [&](int, int) {
    for (int64_t item; (item = queue.next()) >= 0;) {
      const int64_t begin = item / row_parts * group;
      const Span tiles = even_span(job.tiles, row_parts, item % row_parts);
      run_item<T>(job, begin, std::min(begin + group, job.blocks), tiles.begin, tiles.end);
    }
  });
}

}  // namespace
}  // namespace xllm

using namespace xllm;

XLLM_EXPORT AOTITorchError aoti_torch_cpu_packed_linear(AtenTensorHandle x_handle, AtenTensorHandle weight_handle,
                                                        AtenTensorHandle* bias_handle, int64_t out_features,
                                                        int32_t f32_out, AtenTensorHandle* ret0) {
  return run("packed_linear", [&] {
    const View x("x", x_handle), weight("weight", weight_handle);
    x.expect_dim(2).expect_last_contiguous();
    weight.expect_dtype(x.dtype);
    Job job{};
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
      job.weight = weight.ptr<const uint32_t>();
      job.block_stride = weight.strides[0] / kPair<T>;
      job.blocks = weight.sizes[0];
      job.steps = weight.sizes[1];
      job.rows = x.sizes[0];
      job.tiles = (job.rows + kTileRows - 1) / kTileRows;
      job.columns = out_features;
      job.f32_out = f32_out != 0;
      job.out = out.ptr<void>();
#if defined(XLLM_AMX)
      if (kPair<T> == 2) {
        if (job.rows > 0) linear_tiles(x, job);
        return out.release(ret0);
      }
#endif
      if (job.rows > 0) linear<T>(x, job);
      out.release(ret0);
    });
  });
}
