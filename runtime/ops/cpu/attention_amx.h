// A block of keys against a tile of up to 16 rows, in bfloat16 on AMX tiles.
//
// The scores are computed transposed, keys x rows: the keys are then the operand that lies in memory row by row, so the
// cache is multiplied where it lies, and the softmax runs with a row of the query in every lane, without sums across
// lanes. Decode and prefill share this path: a row gives the same bits alone or in a batch.
#pragma once

#include "amx.h"
#include "attention_tile.h"

namespace xllm {

#if defined(XLLM_AMX)

// Keys of a block as tiles: where they lie in the cache, or a copy filled with zeros if the block is not full, because
// a tile always has 16 rows and those after the last key may lie outside the cache.
struct KeyRows {
  const bf16* data;
  int64_t stride;
};
inline KeyRows tile_keys(const Block& block) {
  const Problem& p = block.p;
  const int64_t count = block.keys.end - block.keys.begin, width = p.cache.head_dim;
  if (count == kKeys)
    return {p.cache.key<const bf16>(block.slot, block.keys.begin, block.head), p.cache.view.strides[1]};
  bf16* copy = reinterpret_cast<bf16*>(block.b.keys);
  for (int64_t key = 0; key < count; ++key)
    std::memcpy(copy + key * width, p.cache.key<const bf16>(block.slot, block.keys.begin + key, block.head),
                size_t(width) * 2);
  std::memset(copy + count * width, 0, size_t((kKeys - count) * width) * 2);
  return {copy, width};
}

// Pairs the block's values into the buffer, zeros after the last.
inline void tile_values(const Block& block, int64_t lines) {
  const Problem& p = block.p;
  for (int64_t key = block.keys.begin; key < block.keys.end; key += 2) {
    uint32_t* to = block.b.values + (key - block.keys.begin) / 2 * p.padded_dim;
    load_values(p, block.slot, block.head, {key, std::min(key + 2, block.keys.end)}, to, bf16{});
    block.ahead.step(lines);
  }
  const int64_t pairs = (block.keys.end - block.keys.begin + 1) / 2;
  std::memset(block.b.values + pairs * p.padded_dim, 0, size_t((kKeys / 2 - pairs) * p.padded_dim) * 4);
}

// scores [kKeys][16] of all 16 rows of a query tile; prefetches `lines` after every 32 elements of the head.
inline void tile_scores(const Block& block, const KeyRows& keys, const uint32_t* queries, int64_t lines) {
  static_assert(kKeys == 4 * kTileSide, "four key tiles");
  const int64_t bytes = keys.stride * 2;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t unit = 0; unit < block.p.units; unit += kTileUnits) {
    const bf16* at = keys.data + 2 * unit;
    _tile_loadd(6, queries + unit * kTileSide, kTileSide * 4);
    _tile_loadd(4, at, bytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, at + kTileSide * keys.stride, bytes);
    _tile_dpbf16ps(1, 5, 6);
    _tile_loadd(4, at + 2 * kTileSide * keys.stride, bytes);
    _tile_dpbf16ps(2, 4, 6);
    _tile_loadd(5, at + 3 * kTileSide * keys.stride, bytes);
    _tile_dpbf16ps(3, 5, 6);
    block.ahead.step(lines);
  }
  float* to = block.b.scores;
  _tile_stored(0, to, kTileSide * 4);
  _tile_stored(1, to + kTileSide * kTileSide, kTileSide * 4);
  _tile_stored(2, to + 2 * kTileSide * kTileSide, kTileSide * 4);
  _tile_stored(3, to + 3 * kTileSide * kTileSide, kTileSide * 4);
}

// Scores to weights, as tiles of 16 rows x 32 keys in b.probs; updates the rows' maximum and total. Returns the factors
// by which earlier sums shrink, a row in each lane.
inline vf tile_softmax(const Block& block, int64_t row, int64_t count, int64_t state) {
  const Rows& rows = block.rows;
  const State& split = block.b.split;
  const int64_t begin = block.keys.begin;
  vi lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  const vf earlier = load_n(split.maximum + state, count);
  vf best = earlier;
  float* scores = block.b.scores;
  if (rows.low(row + count - 1) > begin || rows.position(row) + 1 < begin + kKeys) {
    vi low{}, high{};
    for (int64_t r = 0; r < count; ++r) {
      low[r] = int32_t(std::max<int64_t>(rows.low(row + r) - begin, 0));
      high[r] = int32_t(std::min<int64_t>(rows.position(row + r) + 1 - begin, kKeys));
    }
    for (int32_t k = 0; k < kKeys; ++k) {
      const vf score = load(scores + k * kLanes) * block.p.scale;
      const vf seen = (vi)((vi{} + k < low) | (vi{} + k >= high)) ? splat(kMinusInfinity) : score;
      best = max(best, seen);
      store(scores + k * kLanes, seen);
    }
  } else {
    for (int32_t k = 0; k < kKeys; ++k) {
      const vf score = load(scores + k * kLanes) * block.p.scale;
      best = max(best, score);
      store(scores + k * kLanes, score);
    }
  }
  // A row that has seen no key yet: any finite reference gives weights of zero instead of NaN.
  const vf reference = best == splat(kMinusInfinity) ? vf{} : best;
  const vf factor = exp(earlier - reference);
  store_n(split.maximum + state, best, count);
  vf total{};
  for (int64_t r = 0; r < count; ++r) total[r] = split.total[state + r][0];
  total *= factor;
  const vi is_row = lane < int32_t(count);
  alignas(64) uint32_t pairs[kTileUnits * kTileSide];
  for (int64_t tile = 0; tile < kKeys / (2 * kTileUnits); ++tile) {
    const uint32_t* units[kTileSide];
    for (int64_t unit = 0; unit < kTileUnits; ++unit) {
      const float* at = scores + (tile * kTileUnits + unit) * 2 * kLanes;
      const vf even = exp(load(at) - reference), odd = exp(load(at + kLanes) - reference);
      total += even;
      total += odd;
      const vu pair = zero_extend(narrow(even)) | (zero_extend(narrow(odd)) << 16);
      store_raw(pairs + unit * kTileSide, is_row ? pair : vu{});
      units[unit] = pairs + unit * kTileSide;
    }
    transpose_block<true>(units, kTileSide, 0, kTileSide, block.b.probs + tile * kTileUnits * kTileSide, kTileUnits);
  }
  for (int64_t r = 0; r < count; ++r) split.total[state + r] = vf{total[r]};
  return factor;
}

// out = out * factor + weights . values. Lanes and rows past `count` belong to other states: their weights are zero.
inline void tile_outputs(const Block& block, int64_t count, int64_t state, vf factor) {
  const int64_t width = block.p.padded_dim;
  float* out = block.b.split.out + state * width;
  for (int64_t r = 0; r < count; ++r) {
    if (factor[r] == 1.0f) continue;
    for (int64_t i = 0; i < width; i += kLanes) store(out + r * width + i, load(out + r * width + i) * factor[r]);
  }
  for (int64_t column = 0; column < width; column += 2 * kTileSide) {
    const uint32_t* values = block.b.values + column;
    float* to = out + column;
    _tile_loadd(0, to, width * 4);
    _tile_loadd(1, to + kTileSide, width * 4);
    for (int64_t tile = 0; tile < kKeys / (2 * kTileUnits); ++tile) {
      _tile_loadd(4, block.b.probs + tile * kTileUnits * kTileSide, kTileUnits * 4);
      _tile_loadd(6, values + tile * kTileUnits * width, width * 4);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, values + tile * kTileUnits * width + kTileSide, width * 4);
      _tile_dpbf16ps(1, 4, 7);
    }
    _tile_stored(0, to, width * 4);
    _tile_stored(1, to + kTileSide, width * 4);
  }
}

// The block against every row of the item.
inline void run_tiles(const Block& block, const Item& item, int64_t head) {
  const int64_t tiles = (item.rows() + kTileSide - 1) / kTileSide;
  // Lines of the next block that are fetched while this one is computed: as many as it has.
  const int64_t block_lines = kKeys * block.p.units / 8;
  const KeyRows keys = tile_keys(block);
  tile_values(block, block_lines / kKeys);
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const Span span = even_span(item.rows(), tiles, tile);
    const int64_t row = item.row_begin + span.begin, count = span.end - span.begin;
    const Range seen = block.rows.keys(row, item.row_begin + span.end);
    if (seen.end <= block.keys.begin || seen.begin >= block.keys.end) continue;
    const int64_t state = head * item.rows() + span.begin;
    const uint32_t* queries = block.b.queries + (head * tiles + tile) * kTileSide * block.p.units;
    tile_scores(block, keys, queries, tile == 0 ? block_lines / 2 / (block.p.units / kTileUnits) : 0);
    tile_outputs(block, count, state, tile_softmax(block, row, count, state));
  }
}

#endif

}  // namespace xllm
