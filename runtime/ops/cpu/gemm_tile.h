// Products of packed weights in vector registers.
//
// Rows are packed into tiles of at most kTileRows, [unit][row], once per call. Work items are (group of column blocks,
// range of row tiles): the group stays in L2 while the row tiles pass over it, and with one tile the weights are
// streamed once. The whole reduction axis runs in registers, so there is one rounding order for every tile height.
#pragma once

#include <algorithm>
#include <type_traits>
#include <utility>

#include "gemm.h"

namespace xllm {

// Bytes of weights a group of blocks may hold: a share of L2 that leaves room for row tiles.
constexpr int64_t kGroupBytes = 256 * 1024;

struct TileJob : Product {
  const uint32_t* packed;
  int64_t tiles;
  // Sums of the groups of each row, [rows][groups], where columns have zero points.
  const float* group_sums;
};

// What a product takes its columns from. multiply<T, R, NB>(a, block, column, begin, end, acc) adds units [begin, end) of
// R rows times kTileColumns columns, from `column` on, of each of NB blocks. The sums of group_units() units are one
// group, which scale(block, group, column) multiplies, less zero(block, group, column) times the sum of x with kHasZero;
// without kIsGrouped all units are one group and nothing does.
template <class T>
struct StoredColumns {
  static constexpr bool kIsGrouped = false, kHasZero = false;
  const uint32_t* data;
  // In units.
  int64_t block_stride;
  // Number of the block that `data` begins with.
  int64_t first_block;

  template <int R, int NB>
  XLLM_INLINE void multiply(const uint32_t* a, int64_t block, int64_t column, int64_t begin, int64_t end,
                            vf (&acc)[R][NB * kTileVecs]) const {
    // Tiles of few rows are bound by memory: prefetch 48 steps (6 KiB) ahead, 1.05 of the rate of 12 steps in paired
    // runs. From 5 rows on it costs what it gains (0.95 at 8 rows).
    constexpr int kAhead = R <= 4 ? kBlockColumns * 48 : 0;
    const uint32_t* from = data + (block - first_block) * block_stride + begin * kBlockColumns + column;
    xllm::multiply<T, R, NB, kAhead>(a, 1, R, from, kBlockColumns, block_stride, end - begin, acc);
  }
};

// Packed weights as they lie in memory.
template <class T>
struct PlainWeight {
  static constexpr bool kIsStored = true;
  const uint32_t* data;
  int64_t block_stride;
  StoredColumns<T> columns() const { return {data, block_stride, 0}; }
  const uint32_t* panel(int64_t block, int64_t unit, int64_t, uint32_t*) const {
    return data + block * block_stride + unit * kBlockColumns;
  }
};

template <class T, int R, int NB, class Columns>
void block_tile(const TileJob& job, const Columns& columns, const uint32_t* a, int64_t row, int64_t block) {
  constexpr int kVectors = NB * kTileVecs;
  for (int64_t sub = 0; sub < kBlockColumns; sub += kTileColumns) {
    // Copied with constant indices: an accumulator that is indexed by a loop would live in memory, not in a register.
    vf result[R][kVectors];
    if constexpr (Columns::kIsGrouped) {
      vf total[R][kVectors] = {};
      const int64_t groups = Columns::kHasZero ? job.steps / columns.group_units() : 0;
      for (int64_t group = 0, unit = 0; unit < job.steps; ++group, unit += columns.group_units()) {
        vf acc[R][kVectors] = {};
        columns.template multiply<R, NB>(a + unit * R, block, sub, unit, unit + columns.group_units(), acc);
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) {
          const vf scale = columns.scale(block + v / kTileVecs, group, sub + v % kTileVecs * kLanes);
#pragma GCC unroll 16
          for (int r = 0; r < R; ++r) total[r][v] = multiply_add(acc[r][v], scale, total[r][v]);
          if constexpr (Columns::kHasZero) {
            const vf offset = -scale * columns.zero(block + v / kTileVecs, group, sub + v % kTileVecs * kLanes);
            const float* sums = job.group_sums + row * groups + group;
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) total[r][v] = multiply_add(splat(sums[r * groups]), offset, total[r][v]);
          }
        }
      }
      unrolled_copy(total, result);
    } else {
      vf acc[R][kVectors] = {};
      columns.template multiply<R, NB>(a, block, sub, 0, job.steps, acc);
      unrolled_copy(acc, result);
    }
    for (int n = 0; n < NB; ++n) {
      for (int v = 0; v < kTileVecs; ++v) {
        const int64_t first = (block + n) * kBlockColumns + sub + v * kLanes;
        const int64_t count = job.columns - first < kLanes ? job.columns - first : kLanes;
        if (count <= 0) break;
        const Finish finish = finish_of<T>(job, first, count);
        for (int r = 0; r < R; ++r)
          store_results<T>(job, row + r, first, count, finish(result[r][n * kTileVecs + v]));
      }
    }
  }
}

template <class T, int R, class Columns>
void tile_columns(const TileJob& job, const Columns& columns, const uint32_t* a, int64_t row, int64_t begin,
                  int64_t end) {
  int64_t block = begin;
  for (; block + kWide<R> <= end; block += kWide<R>) block_tile<T, R, kWide<R>>(job, columns, a, row, block);
  for (; block < end; ++block) block_tile<T, R, 1>(job, columns, a, row, block);
}

template <class Columns>
using TileColumns = void (*)(const TileJob&, const Columns&, const uint32_t*, int64_t, int64_t, int64_t);

template <class T, class Columns, int... I>
TileColumns<Columns> kernel_for(int64_t rows, std::integer_sequence<int, I...>) {
  static constexpr TileColumns<Columns> kTable[] = {tile_columns<T, I + 1, Columns>...};
  return kTable[rows - 1];
}

// Blocks [block_begin, block_end) of row tiles `tiles`.
template <class T, class Columns>
void run_item(const TileJob& job, const Columns& columns, int64_t block_begin, int64_t block_end, Span tiles) {
  for (int64_t tile = tiles.begin; tile < tiles.end; ++tile) {
    const Span rows = even_span(job.rows, job.tiles, tile);
    const auto kernel = kernel_for<T, Columns>(rows.end - rows.begin, std::make_integer_sequence<int, kTileRows>());
    kernel(job, columns, job.packed + rows.begin * job.steps, rows.begin, block_begin, block_end);
  }
}

template <class T>
void pack_tile(const View& x, const TileJob& job, int64_t tile, uint32_t* packed) {
  const Span span = even_span(job.rows, job.tiles, tile);
  const int count = int(span.end - span.begin);
  const T* rows[kTileRows];
  for (int r = 0; r < count; ++r) rows[r] = x.ptr<const T>() + (span.begin + r) * x.strides[0];
  transpose_units(rows, count, x.sizes[1], packed + span.begin * job.steps, count);
}

// Sums of `group` elements each, in order.
template <class T>
void sum_groups(const View& x, int64_t row, int64_t group, float* sums) {
  const T* from = x.ptr<const T>() + row * x.strides[0];
  for (int64_t begin = 0; begin < x.sizes[1]; begin += group) {
    float sum = 0;
    for (int64_t i = begin; i < begin + group; ++i) sum += to_float(from[i]);
    *sums++ = sum;
  }
}

template <class T, class Weight>
void linear_registers(const View& x, const Product& product, const Weight& weight) {
  TileJob job{product};
  job.tiles = (job.rows + kTileRows - 1) / kTileRows;
  const bool direct = job.rows == 1 && x.sizes[1] % kPair<T> == 0;
  static thread_local Scratch scratch;
  uint32_t* packed = direct ? nullptr : scratch.get<uint32_t>(size_t(job.rows * job.steps) * 4);
  job.packed = direct ? x.ptr<const uint32_t>() : packed;

  const int threads = threads_for(job.rows * job.steps * job.blocks * 4);
  const int64_t block_units = job.steps * kBlockColumns;
  // One tile reads a group once: as many blocks as it takes together, so that no thread ends much later than another.
  const int64_t wanted = job.tiles == 1 ? (job.rows <= 4 ? 4 : 1) : std::max<int64_t>(1, kGroupBytes / (block_units * 4));
  const int64_t group = std::max<int64_t>(1, std::min(wanted, job.blocks / (2 * threads)));
  const int64_t groups = (job.blocks + group - 1) / group;
  // Few column groups for the threads: share the row tiles of a group as well.
  const int64_t row_parts = std::min(job.tiles, std::max<int64_t>(1, 4 * threads / groups));
  const int64_t items = groups * row_parts;

  const auto pack = [&](int64_t tile) { pack_tile<T>(x, job, tile, packed); };
  if (!direct) parallel_for(job.tiles > 1 ? threads : 1, job.tiles, pack);
  if constexpr (std::decay_t<decltype(weight.columns())>::kHasZero) {
    static thread_local Scratch sums;
    const int64_t units = weight.columns().group_units(), row_groups = job.steps / units;
    float* to = sums.get<float>(size_t(job.rows * row_groups) * 4);
    parallel_for(job.tiles > 1 ? threads : 1, job.rows,
                 [&](int64_t row) { sum_groups<T>(x, row, units * kPair<T>, to + row * row_groups); });
    job.group_sums = to;
  }
  WorkQueue queue(items);
  parallel(threads, [&](int, int) {
    static thread_local Scratch unpacked;
    for (int64_t item; (item = queue.next()) >= 0;) {
      const int64_t begin = item / row_parts * group, end = std::min(begin + group, job.blocks);
      const Span tiles = even_span(job.tiles, row_parts, item % row_parts);
      if constexpr (!Weight::kIsStored) {
        // What one tile reads once is unpacked in registers; what many read, to cache.
        if (tiles.end - tiles.begin > 1) {
          uint32_t* to = unpacked.get<uint32_t>(size_t(group * (block_units + kUnpackSlack)) * 4);
          run_item<T>(job, weight.unpacked(begin, end, job.steps, to), begin, end, tiles);
          continue;
        }
      }
      run_item<T>(job, weight.columns(), begin, end, tiles);
    }
  });
}

}  // namespace xllm
