// Products of packed weights in vector registers.
//
// Rows are packed into tiles of at most kTileRows, [unit][row], once per call. With one tile the weights are streamed
// once; with several, work items are (group of column blocks, range of row tiles): the group stays in L2 while the row
// tiles pass over it. The whole reduction axis runs in registers, so there is one rounding order for every tile height.
//
// A thread walks a range of blocks of its own, in the order they lie in memory. Measured in paired runs, against blocks
// handed out in turns and read four at a time: 1.03 to 1.1 of the rate of bfloat16 weights for one to twelve rows, 1.1 to
// 1.3 of codes; with AVX2 1.2 to 1.6 for one and two.
//
// A thread claims an item before it begins the one ahead of it, and so knows what it will read. While it multiplies one
// block of stored weights it fetches the next; while several rows are multiplied with one block of quantised weights
// the next is unpacked, by execution units that products leave idle.
#pragma once

#include <algorithm>
#include <type_traits>
#include <utility>

#include "fixed_rows.h"
#include "gemm.h"
#include "rounded_rows.h"

namespace xllm {

// Bytes of weights a group of blocks may hold: a share of L2 that leaves room for row tiles and for the next group.
constexpr int64_t kGroupBytes = 128 * 1024;

struct TileJob : Product {
  uint32_t* packed;
  int64_t tiles;
  // Sums of the groups of each row, [rows][groups], where columns have zero points.
  const float* group_sums;
  // Where rows are rounded: what their codes mean, and what the sums of each group begin with, [group][row of the tile].
  float* row_scale;
  int32_t* begins;
  // Where the row is one of fixed-point numbers: the units of its groups.
  float* units;
  // There is room after each tile, for who reads it by whole vectors.
  uint32_t* tile_at(int64_t tile, int64_t row) const { return packed + row * steps + tile * kLanes; }
};

// The cache lines of every step that are read together, one or two, are fetched, which lie this many bytes from where it
// is read: the hardware prefetchers stop at 4 KiB pages. kLocality 3 is L1, 2 is L2.
template <int kLocality, int kLines>
struct Fetch {
  int64_t first, second;
  XLLM_INLINE void operator()(const void* step, int64_t, int64_t) const {
    __builtin_prefetch(static_cast<const char*>(step) + first, 0, kLocality);
    if (kLines > 1) __builtin_prefetch(static_cast<const char*>(step) + second, 0, kLocality);
  }
};

// What is done while a block is multiplied: `before` up to unit `turn`, then `after`; the latter is for block `next`.
template <class Work>
struct Meanwhile {
  int64_t next, turn;
  Work before, after;
};
struct Nothing {
  XLLM_INLINE void operator()(const void*, int64_t, int64_t) const {}
};

// What a product takes its columns from. multiply<R, N>(a, block, column, begin, end, work, acc) adds units [begin, end)
// of R rows times N * kTileColumns columns of a block, from `column` on, and at every step of kUnits units calls
// work(where the step is read, its first unit, column). Blocks lie block_bytes() apart. Up to kMostRows rows are
// multiplied with columns as they lie, with kIsDirect any number. The sums of group_units() units are one group, which
// scale(block, group, column) multiplies, less zero(block, group, column) times the sum of x with kHasZero; without
// kIsGrouped all units are one group and nothing does. With kIsRounded the rows are packed as codes and sums are int32;
// with kIsFixed as well, the one row is packed as fixed-point numbers. With kHasUnits rows are rounded to such numbers
// and stay bfloat16.
template <class T>
struct StoredColumns {
  static constexpr bool kIsStored = true, kIsDirect = true, kIsGrouped = false, kHasZero = false, kIsRounded = false;
  static constexpr bool kIsFixed = false, kHasUnits = false;
  static constexpr int kMostRows = kTileRows;
  static constexpr int64_t kUnits = 1;
  const uint32_t* data;
  // In units.
  int64_t block_stride;
  // Number of the block that `data` begins with.
  int64_t first_block;
  int64_t block_bytes() const { return 4 * block_stride; }

  template <int R, int N, class Work>
  XLLM_INLINE void multiply(const uint32_t* a, int64_t block, int64_t column, int64_t begin, int64_t end, Work work,
                            vf (&acc)[R][N * kTileVecs]) const {
    const uint32_t* from = data + (block - first_block) * block_stride + begin * kBlockColumns + column;
    xllm::multiply<T, R, N>(a, 1, R, from, kBlockColumns, kTileColumns, end - begin, acc,
                            [=](const uint32_t* step, int64_t k)
                                __attribute__((always_inline)) { work(step, begin + k, column); });
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

// The sums of one group take as many registers as the totals: a tile of rows needs what twice its rows need without
// groups. Where one tile can have all rows it may be higher than that, with totals in L1: better than to read weights
// twice. A few rows take several column tiles of a block where vectors are short: enough accumulators to hide the latency
// of the multiply-adds.
template <class Columns, int R>
constexpr int kColumnTiles = Columns::kIsRounded
                                 ? 1
                                 : std::min<int>(kBlockColumns / kTileColumns, kWide<Columns::kIsGrouped ? 2 * R : R>);
template <class Columns>
int64_t num_tiles(int64_t rows) {
  constexpr int64_t kMostRows = Columns::kIsGrouped ? kTileRows / 2 : kTileRows;
  return rows <= kTileRows ? 1 : (rows + kMostRows - 1) / kMostRows;
}

template <class Columns>
int64_t num_groups(const Columns& columns, int64_t units) {
  if constexpr (Columns::kIsGrouped) return units / columns.group_units();
  return 1;
}

template <class Columns>
using SumOf = std::conditional_t<Columns::kIsRounded, vi, vf>;

// The sums of a group before its first product; `begins` are the tile's.
template <class Columns, int R, int V>
XLLM_INLINE void begin_sums(const int32_t* begins, int64_t group, SumOf<Columns> (&acc)[R][V]) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    SumOf<Columns> begin{};
    if constexpr (Columns::kIsRounded) begin += begins[group * R + r];
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) acc[r][v] = begin;
  }
}

template <class T, int R, class Columns, class Work>
__attribute__((noinline)) void block_tile(const TileJob& job, const Columns& columns, const uint32_t* a, int64_t row,
                                          int64_t block, const Meanwhile<Work>& meanwhile) {
  constexpr int N = kColumnTiles<Columns, R>, kVectors = N * kTileVecs;
  const int32_t* begins = Columns::kIsRounded ? job.begins + row * num_groups(columns, job.steps) : nullptr;
  for (int64_t sub = 0; sub < kBlockColumns; sub += N * kTileColumns) {
    // Copied with constant indices: an accumulator that is indexed by a loop would live in memory, not in a register.
    vf result[R][kVectors];
    if constexpr (Columns::kIsGrouped) {
      vf total[R][kVectors] = {};
      const int64_t groups = num_groups(columns, job.steps);
      for (int64_t group = 0, unit = 0; unit < job.steps; ++group, unit += columns.group_units()) {
        SumOf<Columns> acc[R][kVectors];
        begin_sums<Columns>(begins, group, acc);
        columns.fetch_scales(meanwhile.next, group);
        columns.template multiply<R, N>(a + unit * R, block, sub, unit, unit + columns.group_units(),
                                        unit < meanwhile.turn ? meanwhile.before : meanwhile.after, acc);
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) {
          const vf scale = columns.scale(block, group, sub + v * kLanes);
#pragma GCC unroll 16
          for (int r = 0; r < R; ++r) {
            vf sum = to_floats(acc[r][v]);
            if constexpr (Columns::kIsFixed) sum *= job.units[group];
            total[r][v] = multiply_add(sum, scale, total[r][v]);
          }
          if constexpr (Columns::kHasZero) {
            const vf offset = -scale * columns.zero(block, group, sub + v * kLanes);
            const float* sums = job.group_sums + row * groups + group;
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) total[r][v] = multiply_add(splat(sums[r * groups]), offset, total[r][v]);
          }
        }
      }
      unrolled_copy(total, result);
    } else {
      SumOf<Columns> acc[R][kVectors];
      begin_sums<Columns>(begins, 0, acc);
      for (int64_t unit = 0; unit < job.steps;) {
        const bool is_before = unit < meanwhile.turn;
        const int64_t end = is_before ? meanwhile.turn : job.steps;
        columns.template multiply<R, N>(a + unit * R, block, sub, unit, end,
                                        is_before ? meanwhile.before : meanwhile.after, acc);
        unit = end;
      }
      unrolled_copy(acc, result);
    }
    for (int v = 0; v < kVectors; ++v) {
      const int64_t first = block * kBlockColumns + sub + v * kLanes;
      const int64_t count = job.columns - first < kLanes ? job.columns - first : kLanes;
      if (count <= 0) break;
      const Finish finish = finish_of<T>(job, first, count);
      for (int r = 0; r < R; ++r) {
        vf y = result[r][v];
        if constexpr (Columns::kIsRounded) y *= job.row_scale[row + r];
        store_results<T>(job, row + r, first, count, finish(y));
      }
    }
  }
}

// Calls body(constant R) for 1 to kMost rows.
template <int kMost, class Body>
void with_rows(int64_t rows, Body body) {
  if constexpr (kMost > 1)
    if (rows < kMost) return with_rows<kMost - 1>(rows, body);
  body(std::integral_constant<int, kMost>());
}

// Both lines of a step are read at once.
template <class Columns, int R>
constexpr bool kReadsSteps = kColumnTiles<Columns, R> * kTileColumns > 16;

// Measured in paired runs of 5 to 8 rows: 1.15 of the rate of L1 by L2 with bfloat16 weights, 1.25 the other way with
// codes.
template <class Columns, int R>
using FetchSoon = Fetch<(Columns::kIsStored && R > 4) ? 2 : 3, kReadsSteps<Columns, R> ? 2 : 1>;

// What is fetched while a block is read by one tile that has all rows: what it reads kAheadSteps later, at the end of the
// block the beginning of block `next`.
template <class Columns, int R>
Meanwhile<FetchSoon<Columns, R>> fetch_soon(const TileJob& job, const Columns& columns, int64_t block, int64_t next) {
  constexpr int64_t kAheadSteps = 48;
  int64_t whole = Columns::kUnits;
  if constexpr (Columns::kIsGrouped) whole = columns.group_units();
  const int64_t turn = std::max<int64_t>(0, job.steps - kAheadSteps * Columns::kUnits) / whole * whole;
  const int64_t read = turn / Columns::kUnits * kStepBytes;
  const int64_t rest = (job.steps + Columns::kUnits - 1) / Columns::kUnits * kStepBytes - read;
  const int64_t jump = (next - block) * columns.block_bytes() - read;
  return {next, turn, {rest, rest + 64}, {jump, jump + 64}};
}

// Measured in paired runs of 12 to 48 rows: 1.05 to 1.1 of the rate of L2 by L1 where steps are read at once, the other
// way where weights are read in halves of them.
template <class Columns, int R>
using FetchLater = Fetch<(Columns::kIsStored && !kReadsSteps<Columns, R>) ? 2 : 3, 1>;

// The same where `tile` is one of several: most find the block in L2 and leave memory idle. The first two fetch all of
// block `next`, each one of the two lines of a step.
template <class Columns, int R>
Meanwhile<FetchLater<Columns, R>> fetch_later(const Columns& columns, int64_t tile, int64_t block, int64_t next) {
  const int64_t line = tile < 2 ? (next - block) * columns.block_bytes() + tile * 64 : 0;
  return {next, 0, {}, {line}};
}

// All rows, which are one tile, times the blocks that the queue gives the thread.
template <class T, class Columns>
void run_stream(const TileJob& job, const Columns& columns, RangeQueue& queue, int thread) {
  with_rows<Columns::kMostRows>(job.rows, [&](auto height) {
    constexpr int R = height.value;
    for (int64_t block = queue.next(thread), following; block >= 0; block = following) {
      following = queue.next(thread);
      const auto fetch = fetch_soon<Columns, R>(job, columns, block, following < 0 ? block : following);
      block_tile<T, R>(job, columns, job.packed, 0, block, fetch);
    }
  });
}

// Blocks [begin, end) of row tiles `tiles`, read where they lie; `following` is the first block of the next item.
template <class T, class Columns>
void run_item(const TileJob& job, const Columns& columns, int64_t begin, int64_t end, Span tiles, int64_t following) {
  for (int64_t tile = tiles.begin; tile < tiles.end; ++tile) {
    const Span rows = even_span(job.rows, job.tiles, tile);
    const uint32_t* a = job.tile_at(tile, rows.begin);
    with_rows<Columns::kMostRows>(rows.end - rows.begin, [&](auto height) {
      constexpr int R = height.value;
      for (int64_t block = begin; block < end; ++block) {
        const auto fetch = fetch_later<Columns, R>(columns, tile - tiles.begin, block, following + block - begin);
        block_tile<T, R>(job, columns, a, rows.begin, block, fetch);
      }
    });
  }
}

// Packs a tile of rows, rounded where the columns want it.
template <class T, class Columns>
void pack_tile(const View& x, const TileJob& job, const Columns& columns, int64_t tile) {
  const Span span = even_span(job.rows, job.tiles, tile);
  const int count = int(span.end - span.begin);
  const T* rows[kTileRows];
  for (int r = 0; r < count; ++r) rows[r] = x.ptr<const T>() + (span.begin + r) * x.strides[0];
  uint32_t* packed = job.tile_at(tile, span.begin);
  static thread_local Scratch scratch;
  if constexpr (Columns::kIsFixed) {
    const int64_t width = x.sizes[1];
    split_row(rows[0], width, width / num_groups(columns, job.steps), Columns::kOffset,
              reinterpret_cast<uint8_t*>(packed), job.units, job.begins);
    job.row_scale[0] = 1;
    return;
  } else if constexpr (Columns::kIsRounded) {
    round_tile(rows, count, x.sizes[1], job.steps, Columns::kIsInterleaved,
               scratch.get<uint32_t>(size_t(count * job.steps) * 4), packed, job.row_scale + span.begin);
    const int64_t groups = num_groups(columns, job.steps);
    begin_groups(packed, count, job.steps, job.steps / groups, Columns::kOffset,
                 job.begins + span.begin * groups);
    return;
  } else if constexpr (Columns::kHasUnits) {
    const int64_t group = x.sizes[1] / num_groups(columns, job.steps);
    if (group <= kMostFixedGroup) {
      T* rounded = scratch.get<T>(size_t(count * x.sizes[1]) * sizeof(T));
      for (int r = 0; r < count; ++r, rounded += x.sizes[1]) {
        round_to_units(rows[r], x.sizes[1], group, rounded);
        rows[r] = rounded;
      }
    }
  }
  transpose_units(rows, count, x.sizes[1], packed, count);
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

// Blocks that are multiplied unpacked, one an item: the next is unpacked while the first row tile passes over this one.
template <class T, class Weight>
void run_unpacked(const TileJob& job, const Weight& weight, int64_t row_parts, RangeQueue& queue, int thread) {
  using Columns = decltype(weight.unpacked(0, nullptr));
  static thread_local Scratch scratch;
  const int64_t size = job.steps * kBlockColumns + kUnpackSlack;
  uint32_t* buffer = scratch.get<uint32_t>(size_t(2 * size) * 4);
  uint32_t* other = buffer + size;
  int64_t item = queue.next(thread);
  if (item >= 0) weight.codes.unpack(item / row_parts, 0, job.steps, buffer);
  for (int64_t following; item >= 0; item = following, std::swap(buffer, other)) {
    following = queue.next(thread);
    const int64_t block = item / row_parts, next = following < 0 ? block : following / row_parts;
    const Columns columns = weight.unpacked(block, buffer);
    const Span tiles = even_span(job.tiles, row_parts, item % row_parts);
    for (int64_t tile = tiles.begin; tile < tiles.end; ++tile) {
      const Span rows = even_span(job.rows, job.tiles, tile);
      const uint32_t* a = job.tile_at(tile, rows.begin);
      with_rows<kTileRows>(rows.end - rows.begin, [&](auto height) {
        constexpr int R = height.value;
        if (tile > tiles.begin || following < 0) {
          block_tile<T, R>(job, columns, a, rows.begin, block, Meanwhile<Nothing>{next, 0, {}, {}});
        } else {
          // What comes after `next` mostly lies as far from it.
          const auto unpacker = weight.unpacker(next, 2 * next - block, other);
          using Work = std::decay_t<decltype(unpacker)>;
          block_tile<T, R>(job, columns, a, rows.begin, block, Meanwhile<Work>{next, 0, unpacker, unpacker});
          unpacker.finish(job.steps);
        }
      });
    }
  }
}

template <class T, class Weight>
void linear_registers(const View& x, const Product& product, const Weight& weight) {
  using Columns = std::decay_t<decltype(weight.columns())>;
  TileJob job{product};
  job.tiles = num_tiles<Columns>(job.rows);
  const bool direct = job.rows == 1 && x.sizes[1] % kPair<T> == 0 && !Columns::kIsRounded;
  const bool is_unpacked = !Columns::kIsDirect && job.rows > Columns::kMostRows;
  static thread_local Scratch scratch;
  const int64_t packed_units = job.rows * job.steps + job.tiles * kLanes;
  job.packed = direct ? x.ptr<uint32_t>() : scratch.get<uint32_t>(size_t(packed_units) * 4);
  if constexpr (Columns::kIsRounded) {
    static thread_local Scratch scales, begins, units;
    const int64_t row_groups = job.rows * num_groups(weight.columns(), job.steps);
    job.row_scale = scales.get<float>(size_t(job.rows) * 4);
    job.begins = begins.get<int32_t>(size_t(row_groups) * 4);
    if constexpr (Columns::kIsFixed) job.units = units.get<float>(size_t(row_groups) * 4);
  }

  const int threads = threads_for(job.rows * job.steps * job.blocks * 4);
  const auto pack = [&](int64_t tile) { pack_tile<T>(x, job, weight.columns(), tile); };
  if (!direct) parallel_for(job.tiles > 1 ? threads : 1, job.tiles, pack);
  if constexpr (Columns::kHasZero) {
    static thread_local Scratch sums;
    const int64_t units = weight.columns().group_units(), row_groups = num_groups(weight.columns(), job.steps);
    float* to = sums.get<float>(size_t(job.rows * row_groups) * 4);
    parallel_for(job.tiles > 1 ? threads : 1, job.rows,
                 [&](int64_t row) { sum_groups<T>(x, row, units * kPair<T>, to + row * row_groups); });
    job.group_sums = to;
  }
  if (job.tiles == 1 && !is_unpacked) {
    RangeQueue queue(job.blocks, threads);
    return parallel(threads, [&](int thread, int) { run_stream<T>(job, weight.columns(), queue, thread); });
  }
  const int64_t block_bytes = job.steps * kStepBytes;
  const int64_t wanted = is_unpacked ? 1 : std::max<int64_t>(1, kGroupBytes / block_bytes);
  const int64_t group = std::max<int64_t>(1, std::min(wanted, job.blocks / (2 * threads)));
  const int64_t groups = (job.blocks + group - 1) / group;
  // Few column groups for the threads: share the row tiles of a group as well.
  const int64_t row_parts = std::min(job.tiles, std::max<int64_t>(1, 4 * threads / groups));
  RangeQueue queue(groups * row_parts, threads);
  parallel(threads, [&](int thread, int) {
    if constexpr (!Columns::kIsDirect)
      if (is_unpacked) return run_unpacked<T>(job, weight, row_parts, queue, thread);
    for (int64_t item = queue.next(thread), following; item >= 0; item = following) {
      following = queue.next(thread);
      const int64_t begin = item / row_parts * group;
      run_item<T>(job, weight.columns(), begin, std::min(begin + group, job.blocks),
                  even_span(job.tiles, row_parts, item % row_parts),
                  following < 0 ? begin : following / row_parts * group);
    }
  });
}

}  // namespace xllm
