// packed_linear for bfloat16 on AMX tiles.
//
// 32 rows x 32 columns are four accumulator tiles. A panel of weights, kPanelUnits of one block of columns, stays in L1
// while the rows of an item pass over it; between panels the accumulators rest in memory as float32, which rounds
// nothing. The order of the sums is that of the reduction axis, whatever the number of rows.
#pragma once

#include "amx.h"

#if defined(XLLM_AMX)

#include <algorithm>

#include "gemm.h"

namespace xllm {

constexpr int64_t kRowTile = 2 * kTileSide;
constexpr int64_t kPanelUnits = 128;

// Rows of x in tiles of 16: where a tile begins, how far its rows and its steps along the reduction axis lie apart, in
// units. Rows are filled with zeros up to a multiple of kTileUnits.
struct TileRows {
  const uint32_t* data;
  int64_t tile_stride, row_stride, step_stride;
  const uint32_t* at(int64_t row, int64_t step) const {
    return data + row / kTileSide * tile_stride + step * step_stride;
  }
};

// Cache lines to fetch while tiles are multiplied: `lines` at each step, from `from` on.
struct Ahead {
  const char* from;
  int lines;
};

// acc [rows][32] (+)= a [rows][steps x 16 units] * panel.
template <bool kLower>
inline void multiply_tiles(const TileRows& x, const uint32_t* a, const uint32_t* panel, int64_t steps, float* acc,
                                bool first, Ahead ahead) {
  constexpr int64_t kLowerAt = kTileSide * kBlockColumns;
  const int64_t a_bytes = x.row_stride * 4, b_bytes = kBlockColumns * 4;
  if (first) {
    _tile_zero(0);
    _tile_zero(1);
    if (kLower) {
      _tile_zero(2);
      _tile_zero(3);
    }
  } else {
    _tile_loadd(0, acc, b_bytes);
    _tile_loadd(1, acc + kTileSide, b_bytes);
    if (kLower) {
      _tile_loadd(2, acc + kLowerAt, b_bytes);
      _tile_loadd(3, acc + kLowerAt + kTileSide, b_bytes);
    }
  }
  for (int64_t step = 0; step < steps; ++step) {
    const uint32_t* b = panel + step * kTileUnits * kBlockColumns;
    for (int line = 0; line < ahead.lines; ++line, ahead.from += 64) __builtin_prefetch(ahead.from, 0, 3);
    _tile_loadd(6, b, b_bytes);
    _tile_loadd(4, a + step * x.step_stride, a_bytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b + kTileSide, b_bytes);
    _tile_dpbf16ps(1, 4, 7);
    if (kLower) {
      _tile_loadd(5, a + x.tile_stride + step * x.step_stride, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, acc, b_bytes);
  _tile_stored(1, acc + kTileSide, b_bytes);
  if (kLower) {
    _tile_stored(2, acc + kLowerAt, b_bytes);
    _tile_stored(3, acc + kLowerAt + kTileSide, b_bytes);
  }
}

// The sums of one block of columns, finished, to the output: a row at a time, because rows lie pages apart.
inline void store_block(const Product& job, int64_t block, int64_t row_begin, int64_t row_end, const float* acc) {
  constexpr int kVectors = kBlockColumns / kLanes;
  Finish finish[kVectors] = {};
  int64_t count[kVectors];
  const int64_t first = block * kBlockColumns;
  for (int v = 0; v < kVectors; ++v) {
    count[v] = std::max<int64_t>(0, std::min<int64_t>(job.columns - first - v * kLanes, kLanes));
    if (count[v] > 0) finish[v] = finish_of<bf16>(job, first + v * kLanes, count[v]);
  }
  for (int64_t row = row_begin; row < row_end; ++row, acc += kBlockColumns)
    for (int v = 0; v < kVectors; ++v)
      if (count[v] > 0) store_results<bf16>(job, row, first + v * kLanes, count[v], finish[v](load(acc + v * kLanes)));
}

// Blocks [block_begin, block_end) of rows [row_begin, row_end). `acc` holds 32 float32 for every row, `unpacked` a panel.
template <class Weight>
inline void tile_item(const Product& job, const Weight& weight, const TileRows& x, int64_t block_begin,
                      int64_t block_end, int64_t row_begin, int64_t row_end, float* acc, uint32_t* unpacked) {
  constexpr int64_t kTileBytes = kTileUnits * kBlockColumns * 4;
  alignas(64) uint32_t tail[kTileUnits * kBlockColumns];
  const int64_t row_tiles = (row_end - row_begin + kRowTile - 1) / kRowTile;
  // With few rows the weights stream from memory once, as one panel, and are fetched 3 steps ahead. Otherwise the
  // next panel is fetched in equal parts while the row tiles pass over this one. A panel that is unpacked is in L1.
  const bool one_pass = row_tiles == 1;
  const int64_t panel_units = one_pass && Weight::kIsStored ? std::max(kTileUnits, job.steps) : kPanelUnits;
  const int lines = Weight::kIsStored ? int((kTileBytes / 64 + row_tiles - 1) / row_tiles) : 0;
  int configured = 0;
  for (int64_t block = block_begin; block < block_end; ++block) {
    for (int64_t unit = 0; unit < job.steps; unit += panel_units) {
      const int64_t units = std::min(panel_units, job.steps - unit);
      const int64_t whole = units / kTileUnits, tail_units = units % kTileUnits;
      const uint32_t* panel = weight.panel(block, unit, units, unpacked);
      const char* next = reinterpret_cast<const char*>(panel) + (one_pass ? 3 * kTileBytes : units * kBlockColumns * 4);
      if (tail_units != 0) {
        std::memset(tail, 0, sizeof(tail));
        std::memcpy(tail, panel + whole * kTileUnits * kBlockColumns, size_t(tail_units * kBlockColumns) * 4);
      }
      for (int64_t row = row_begin; row < row_end; row += kRowTile) {
        const int rows = int(std::min(kRowTile, row_end - row));
        const int upper = std::min(rows, kTileSide), lower = rows - upper;
        if (rows != configured) configure_tiles(upper, lower);
        configured = rows;
        const uint32_t* a = x.at(row, unit / kTileUnits);
        float* sums = acc + (row - row_begin) * kBlockColumns;
        const auto multiply = lower > 0 ? multiply_tiles<true> : multiply_tiles<false>;
        if (whole > 0) multiply(x, a, panel, whole, sums, unit == 0, {next, lines});
        if (tail_units > 0)
          multiply(x, a + whole * x.step_stride, tail, 1, sums, unit == 0 && whole == 0, {nullptr, 0});
        next += whole * lines * 64;
      }
    }
    store_block(job, block, row_begin, row_end, acc);
  }
}

// Fills tile `tile` of `to` with its rows of x.
inline void pack_rows(const View& x, const TileRows& to, int64_t tile) {
  const int64_t columns = x.sizes[1], step_columns = 2 * kTileUnits;
  for (int64_t row = tile * kTileSide; row < std::min(x.sizes[0], (tile + 1) * kTileSide); ++row) {
    const bf16* from = x.ptr<const bf16>() + row * x.strides[0];
    uint32_t* line = const_cast<uint32_t*>(to.at(row, 0)) + row % kTileSide * to.row_stride;
    int64_t column = 0;
    for (; column + step_columns <= columns; column += step_columns, line += to.step_stride)
      std::memcpy(line, from + column, 64);
    if (column < columns) {
      std::memset(line, 0, 64);
      std::memcpy(line, from + column, size_t(columns - column) * 2);
    }
  }
}

template <class Weight>
inline void linear_tiles(const View& x, const Product& job, const Weight& weight) {
  // Bytes of rows that a thread keeps in L2 while weights stream past them.
  constexpr int64_t kItemBytes = 1024 * 1024;
  require_tiles();
  const int threads = threads_for(job.rows * job.steps * job.blocks * 4);
  static thread_local Scratch packed;
  const int64_t steps = (job.steps + kTileUnits - 1) / kTileUnits;
  TileRows rows{x.ptr<const uint32_t>(), 0, 0, kTileUnits};
  if (job.rows > kTileSide || x.sizes[1] % (2 * kTileUnits) != 0 || x.strides[0] % 2 != 0) {
    const size_t bytes = size_t(job.rows + kTileSide) * size_t(steps * kTileUnits) * 4;
    rows = {packed.get<uint32_t>(bytes), steps * kTileUnits * kTileSide, kTileUnits, kTileUnits * kTileSide};
    parallel_for(threads, (job.rows + kTileSide - 1) / kTileSide, [&](int64_t tile) { pack_rows(x, rows, tile); });
  } else {
    rows.row_stride = x.strides[0] / 2;
  }
  const int64_t row_tiles = (job.rows + kRowTile - 1) / kRowTile;
  const int64_t row_parts = std::min(row_tiles, (job.rows * job.steps * 4 + kItemBytes - 1) / kItemBytes);
  // Streaming from memory, small groups keep one thread from ending much later than another.
  const int64_t wanted = row_tiles == 1 ? 4 : job.blocks;
  const int64_t group = std::max<int64_t>(1, std::min(wanted, job.blocks / (4 * threads)));
  const int64_t groups = (job.blocks + group - 1) / group;
  WorkQueue queue(groups * row_parts);
  parallel(threads, [&](int, int) {
    static thread_local Scratch scratch, panel;
    uint32_t* unpacked = Weight::kIsStored ? nullptr : panel.get<uint32_t>(kPanelUnits * kBlockColumns * 4 + kUnpackSlack * 4);
    for (int64_t item; (item = queue.next()) >= 0;) {
      const int64_t begin = item % groups * group;
      const Span tiles = even_span(row_tiles, row_parts, item / groups);
      const int64_t row_begin = tiles.begin * kRowTile, row_end = std::min(job.rows, tiles.end * kRowTile);
      float* acc = scratch.get<float>(size_t((row_end - row_begin + kRowTile) * kBlockColumns) * 4);
      tile_item(job, weight, rows, begin, std::min(begin + group, job.blocks), row_begin, row_end, acc, unpacked);
    }
    _tile_release();
  });
}

}  // namespace xllm
#endif
