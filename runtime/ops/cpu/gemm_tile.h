// Products of packed weights in vector registers.
//
// Rows are packed into tiles of at most kTileRows, [unit][row], once per call. Work items are (group of column blocks,
// range of row tiles): the group stays in L2 while the row tiles pass over it, and with one tile the weights are
// streamed once. The whole reduction axis runs in registers, so there is one rounding order for every tile height.
#pragma once

#include <algorithm>
#include <utility>

#include "gemm.h"

namespace xllm {

constexpr int64_t kSubTiles = kBlockColumns / kTileColumns;
// Bytes of weights a group of blocks may hold: a share of L2 that leaves room for row tiles.
constexpr int64_t kGroupBytes = 256 * 1024;

struct TileJob : Product {
  const uint32_t* weight;
  // In units.
  int64_t block_stride;
  // Number of the block that `weight` begins with.
  int64_t first_block;
  const uint32_t* packed;
  int64_t tiles;
};

template <class T, int R, int NB>
void block_tile(const TileJob& job, const uint32_t* a, int64_t row, int64_t block) {
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
      const int64_t column = (job.first_block + block + n) * kBlockColumns + sub * kTileColumns;
      for (int v = 0; v < kTileVecs; ++v) {
        const int64_t first = column + v * kLanes;
        const int64_t count = job.columns - first < kLanes ? job.columns - first : kLanes;
        if (count <= 0) break;
        const Finish finish = finish_of<T>(job, first, count);
        for (int r = 0; r < R; ++r)
          store_results<T>(job, row + r, first, count, finish(result[r][n * kTileVecs + v]));
      }
    }
  }
}

template <class T, int R>
void tile_columns(const TileJob& job, const uint32_t* a, int64_t row, int64_t begin, int64_t end) {
  int64_t block = begin;
  for (; block + kWide<R> <= end; block += kWide<R>) block_tile<T, R, kWide<R>>(job, a, row, block);
  for (; block < end; ++block) block_tile<T, R, 1>(job, a, row, block);
}

using TileColumns = void (*)(const TileJob&, const uint32_t*, int64_t, int64_t, int64_t);

template <class T, int... I>
TileColumns kernel_for(int64_t rows, std::integer_sequence<int, I...>) {
  static constexpr TileColumns kTable[] = {tile_columns<T, I + 1>...};
  return kTable[rows - 1];
}

template <class T>
void run_item(const TileJob& job, int64_t block_begin, int64_t block_end, int64_t tile_begin, int64_t tile_end) {
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    const Span rows = even_span(job.rows, job.tiles, tile);
    const auto kernel = kernel_for<T>(rows.end - rows.begin, std::make_integer_sequence<int, kTileRows>());
    kernel(job, job.packed + rows.begin * job.steps, rows.begin, block_begin, block_end);
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
  WorkQueue queue(items);
  parallel(threads, [&](int, int) {
    static thread_local Scratch unpacked;
    for (int64_t item; (item = queue.next()) >= 0;) {
      const int64_t begin = item / row_parts * group, count = std::min(group, job.blocks - begin);
      const Span tiles = even_span(job.tiles, row_parts, item % row_parts);
      TileJob part = job;
      part.first_block = begin;
      if constexpr (Weight::kIsStored) {
        part.weight = weight.panel(begin, 0, job.steps, nullptr);
        part.block_stride = weight.block_stride;
      } else {
        part.block_stride = block_units + kUnpackSlack;
        uint32_t* to = unpacked.get<uint32_t>(size_t(group * part.block_stride) * 4);
        for (int64_t n = 0; n < count; ++n) weight.panel(begin + n, 0, job.steps, to + n * part.block_stride);
        part.weight = to;
      }
      run_item<T>(part, 0, count, tiles.begin, tiles.end);
    }
  });
}

}  // namespace xllm
