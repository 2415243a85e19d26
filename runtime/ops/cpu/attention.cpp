// attention: causal grouped-query attention of packed tokens over the KV cache, one kernel for prefill and decode.
//
// All query heads of a key/value head form the rows of one product (row = token * group + head in group), so K and V
// are read once per key/value head. Keys are taken in blocks of kKeys: K is transposed into [unit][key] and V into
// [key pair][element] in thread-local buffers, then both products run on the register tile of tile.h.
//
// Sums are independent of how the work is cut: blocks start at multiples of kKeys, the softmax runs online inside
// splits of kSplit keys, and the partial results of the splits are merged in ascending order, by the one thread that
// walked them all or, when threads outnumber the (sequence, head) pairs, in a second pass over partials in memory.
#include <algorithm>
#include <limits>
#include <utility>
#include <vector>

#include "shim_util.h"
#include "step.h"
#include "tile.h"

namespace xllm {
namespace {

constexpr int64_t kKeys = 64;
constexpr int64_t kSplit = 512;
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
// Rows of one prefill item: amortises the transpose of a key block (about 4% of its products).
constexpr int64_t kItemRows = 16 * kTileRows;

struct Problem {
  View q;
  Cache cache;
  Ints seq_start, context_len, slot;
  int64_t group, units, padded_dim;
  float scale;
  int64_t window;
  void* out;
};

// Rows [row_begin, row_end) of (sequence, kv head) over splits [split_begin, split_end); partial >= 0 says where in the
// shared partial results the rows go, -1 that the item walks every split and writes the output itself.
struct Item {
  int64_t sequence, head, row_begin, row_end, split_begin, split_end, partial;
};

// Softmax state of a row: maximum, per-lane sums and unnormalised output [padded_dim].
struct State {
  float* maximum;
  vf* total;
  float* out;
  int64_t width;

  static int64_t bytes(int64_t rows, int64_t width) { return rows * (64 + int64_t(sizeof(vf)) + width * 4); }
  State(char* memory, int64_t rows, int64_t row_width) : width(row_width) {
    total = reinterpret_cast<vf*>(memory);
    out = reinterpret_cast<float*>(memory + rows * sizeof(vf));
    maximum = out + rows * width;
  }
  void clear(int64_t begin, int64_t end) {
    std::fill(maximum + begin, maximum + end, kMinusInfinity);
    std::memset(total + begin, 0, (end - begin) * sizeof(vf));
    std::memset(out + begin * width, 0, (end - begin) * width * 4);
  }
  // this[row] joined with other[other_row]. Into an empty state this copies bit for bit (factors 0 and 1).
  void merge(int64_t row, const State& other, int64_t other_row) {
    const float theirs = other.maximum[other_row];
    if (theirs == kMinusInfinity) return;
    const float joint = std::max(maximum[row], theirs);
    const vf keep = exp(splat(maximum[row] - joint)), take = exp(splat(theirs - joint));
    maximum[row] = joint;
    total[row] = total[row] * keep + other.total[other_row] * take;
    for (int64_t i = 0; i < width; i += kLanes)
      store(out + row * width + i,
            load(out + row * width + i) * keep + load(other.out + other_row * width + i) * take);
  }
};

// Thread-local buffers, all 64-byte aligned.
struct Buffers {
  uint32_t *keys, *values, *probs, *queries;
  float* scores;
  State split, whole;

  static int64_t align(int64_t bytes) { return (bytes + 63) / 64 * 64; }
  static int64_t bytes(const Problem& p, int64_t rows) {
    return align(p.units * kKeys * 4) + align(kKeys * p.padded_dim * 4) + 2 * align(kTileRows * kKeys * 4) +
           align(rows * p.units * 4) + 2 * align(State::bytes(rows, p.padded_dim)) + 64;
  }
  Buffers(char* memory, const Problem& p, int64_t rows)
      : keys(take<uint32_t>(memory, p.units * kKeys * 4)),
        values(take<uint32_t>(memory, kKeys * p.padded_dim * 4)),
        probs(take<uint32_t>(memory, kTileRows * kKeys * 4)),
        queries(take<uint32_t>(memory, rows * p.units * 4)),
        scores(take<float>(memory, kTileRows * kKeys * 4)),
        split(take<char>(memory, State::bytes(rows, p.padded_dim)), rows, p.padded_dim),
        whole(take<char>(memory, State::bytes(rows, p.padded_dim)), rows, p.padded_dim) {}

 private:
  template <class T>
  static T* take(char*& memory, int64_t bytes) {
    char* start = memory;
    memory += align(bytes);
    return reinterpret_cast<T*>(start);
  }
};

struct Range {
  int64_t begin, end;
};

// Positions of the rows' tokens follow from the context: the step's tokens are its last ones.
struct Rows {
  int64_t first_position, group, window;
  int64_t position(int64_t row) const { return first_position + row / group; }
  int64_t low(int64_t row) const { return window > 0 ? std::max<int64_t>(0, position(row) - window + 1) : 0; }
  Range keys(int64_t begin, int64_t end) const { return {low(begin), position(end - 1) + 1}; }
};

template <class T>
void load_keys(const Problem& p, int64_t slot, int64_t head, Range keys, uint32_t* to) {
  for (int64_t key = keys.begin; key < keys.end; key += 16) {
    const T* rows[16];
    const int count = int(std::min<int64_t>(16, keys.end - key));
    for (int i = 0; i < count; ++i) rows[i] = p.cache.key<const T>(slot, key + i, head);
    transpose_units(rows, count, p.cache.head_dim, to + (key - keys.begin), kKeys);
  }
}

void load_values(const Problem& p, int64_t slot, int64_t head, Range keys, uint32_t* to, float) {
  for (int64_t key = keys.begin; key < keys.end; ++key, to += p.padded_dim) {
    const float* row = p.cache.value<const float>(slot, key, head);
    for_vectors(p.cache.head_dim, [&](int64_t i, int64_t n) { store(reinterpret_cast<float*>(to) + i, load_n(row + i, n)); });
  }
}

XLLM_INLINE vu widen_bits(const bf16* p, int64_t n) {
  uint16_t tmp[kLanes] = {};
  if (n == kLanes) return __builtin_convertvector(load_raw<vh>(p), vu);
  std::memcpy(tmp, p, n * 2);
  return __builtin_convertvector(load_raw<vh>(tmp), vu);
}

void load_values(const Problem& p, int64_t slot, int64_t head, Range keys, uint32_t* to, bf16) {
  for (int64_t key = keys.begin; key < keys.end; key += 2, to += p.padded_dim) {
    const bf16* even = p.cache.value<const bf16>(slot, key, head);
    // The partner of the last key is a zero: its weight is zero, but zero times whatever lies there may be NaN.
    const bf16* odd = key + 1 < keys.end ? p.cache.value<const bf16>(slot, key + 1, head) : nullptr;
    for_vectors(p.cache.head_dim, [&](int64_t i, int64_t n) {
      vu pair = widen_bits(even + i, n);
      if (odd != nullptr) pair |= widen_bits(odd + i, n) << 16;
      store_raw(to + i, pair);
    });
  }
}

// Scores of rows [row, row + R) against a block of keys, softmax update, weighted sum of the values.
template <class T, int R>
void tile_block(const Problem& p, const Buffers& b, const Rows& rows, int64_t row, int64_t item_row, Range keys) {
  const uint32_t* queries = b.queries + item_row * p.units;
  const Range seen = rows.keys(row, row + R);
  const bool edge = rows.low(row + R - 1) > keys.begin || rows.position(row) + 1 < keys.begin + kKeys;
  (void)seen;
  vf best[R];
  for (int r = 0; r < R; ++r) best[r] = splat(kMinusInfinity);
  for (int64_t first = 0; first < kKeys; first += kTileColumns) {
    vf acc[R][kTileVecs] = {};
    multiply<T, R, 1>(queries, 1, R, b.keys + first, kKeys, 0, p.units, acc);
    vf products[R][kTileVecs];
    unrolled_copy(acc, products);
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < kTileVecs; ++v) {
        vf score = products[r][v] * p.scale;
        if (edge) {
          vi lane;
          for (int i = 0; i < kLanes; ++i) lane[i] = i;
          const vi index = lane + int32_t(first + v * kLanes);
          const int32_t low = int32_t(std::max<int64_t>(rows.low(row + r) - keys.begin, 0));
          const int32_t high = int32_t(std::min<int64_t>(rows.position(row + r) + 1 - keys.begin, kKeys));
          score = (vi)((index < low) | (index >= high)) ? splat(kMinusInfinity) : score;
        }
        best[r] = max(best[r], score);
        store(b.scores + r * kKeys + first + v * kLanes, score);
      }
  }
  vf factor[R];
  for (int r = 0; r < R; ++r) {
    float& maximum = b.split.maximum[item_row + r];
    const float joint = std::max(maximum, max(best[r]));
    // A row that has seen no key yet: any finite reference gives weights of zero instead of NaN.
    const float reference = joint == kMinusInfinity ? 0.0f : joint;
    factor[r] = exp(splat(maximum - reference));
    maximum = joint;
    vf total = b.split.total[item_row + r] * factor[r];
    for (int64_t i = 0; i < kKeys; i += kLanes) {
      const vf weight = exp(load(b.scores + r * kKeys + i) - reference);
      total += weight;
      store(reinterpret_cast<T*>(b.probs) + r * kKeys + i, weight);
    }
    b.split.total[item_row + r] = total;
  }
  float* out = b.split.out + item_row * p.padded_dim;
  const int64_t steps = units_of<T>(keys.end - keys.begin);
  for (int64_t d = 0; d < p.padded_dim; d += kTileColumns) {
    vf acc[R][kTileVecs];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
      for (int v = 0; v < kTileVecs; ++v) acc[r][v] = load(out + r * p.padded_dim + d + v * kLanes) * factor[r];
    }
    multiply<T, R, 1>(b.probs, kKeys / kPair<T>, 1, b.values + d, p.padded_dim, 0, steps, acc);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
      for (int v = 0; v < kTileVecs; ++v) store(out + r * p.padded_dim + d + v * kLanes, acc[r][v]);
    }
  }
}

using TileBlock = void (*)(const Problem&, const Buffers&, const Rows&, int64_t, int64_t, Range);

template <class T, int... I>
TileBlock tile_for(int64_t rows, std::integer_sequence<int, I...>) {
  static constexpr TileBlock kTable[] = {tile_block<T, I + 1>...};
  return kTable[rows - 1];
}

template <class T>
void load_queries(const Problem& p, const Item& item, int64_t tiles, uint32_t* to) {
  const int64_t count = item.row_end - item.row_begin;
  const int64_t first_token = p.seq_start[item.sequence];
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const Span span = even_span(count, tiles, tile);
    const T* rows[kTileRows];
    for (int64_t r = span.begin; r < span.end; ++r) {
      const int64_t row = item.row_begin + r;
      rows[r - span.begin] = p.q.ptr<const T>() + (first_token + row / p.group) * p.q.strides[0] +
                             (item.head * p.group + row % p.group) * p.q.strides[1];
    }
    const int height = int(span.end - span.begin);
    transpose_units(rows, height, p.cache.head_dim, to + span.begin * p.units, height);
  }
}

template <class T>
void write_row(const Problem& p, const Item& item, int64_t row, const State& state, int64_t state_row) {
  const int64_t token = p.seq_start[item.sequence] + row / p.group;
  const int64_t head = item.head * p.group + row % p.group, width = p.cache.head_dim;
  T* to = static_cast<T*>(p.out) + (token * p.q.sizes[1] + head) * width;
  const float total = sum(state.total[state_row]);
  const float inverse = 1.0f / total;
  for_vectors(width, [&](int64_t i, int64_t n) {
    store_n(to + i, load(state.out + state_row * state.width + i) * inverse, n);
  });
}

template <class T>
void run_item(const Problem& p, const Item& item, const Buffers& b, State& partials) {
  const int64_t count = item.row_end - item.row_begin;
  const int64_t tiles = (count + kTileRows - 1) / kTileRows;
  const int64_t tokens = p.seq_start[item.sequence + 1] - p.seq_start[item.sequence];
  const Rows rows{p.context_len[item.sequence] - tokens, p.group, p.window};
  const Range reach = rows.keys(item.row_begin, item.row_end);
  State split = b.split, whole = b.whole;
  load_queries<T>(p, item, tiles, b.queries);
  whole.clear(0, count);
  for (int64_t s = item.split_begin; s < item.split_end; ++s) {
    split.clear(0, count);
    const int64_t end = std::min(reach.end, (s + 1) * kSplit);
    const int64_t begin = std::max(s * kSplit, reach.begin / kKeys * kKeys);
    for (int64_t key = begin; key < end; key += kKeys) {
      const Range keys{key, std::min(key + kKeys, end)};
      load_keys<T>(p, p.slot[item.sequence], item.head, keys, b.keys);
      load_values(p, p.slot[item.sequence], item.head, keys, b.values, T{});
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const Span span = even_span(count, tiles, tile);
        const int64_t row = item.row_begin + span.begin;
        const Range seen = rows.keys(row, item.row_begin + span.end);
        if (seen.end <= keys.begin || seen.begin >= keys.end) continue;
        tile_for<T>(span.end - span.begin, std::make_integer_sequence<int, kTileRows>())(p, b, rows, row, span.begin, keys);
      }
    }
    for (int64_t r = 0; r < count; ++r) {
      if (item.partial >= 0)
        partials.merge(item.partial + r, split, r);
      else
        whole.merge(r, split, r);
    }
  }
  if (item.partial < 0)
    for (int64_t r = 0; r < count; ++r) write_row<T>(p, item, item.row_begin + r, whole, r);
}

// Cuts a step into items. Key splits become items of their own only where there are fewer (rows, head) pairs than
// threads can use; their partial results are `partial_rows` rows of state.
struct Plan {
  std::vector<Item> items, merges;
  int64_t partial_rows = 0, item_rows = 0;
};

Plan make_plan(const Problem& p, int threads) {
  Plan plan;
  const int64_t sequences = p.slot.size, heads = p.cache.heads;
  int64_t all_rows = 0;
  for (int64_t s = 0; s < sequences; ++s) all_rows += (p.seq_start[s + 1] - p.seq_start[s]) * p.group;
  const int64_t share = all_rows * heads / (4 * threads) / kTileRows * kTileRows;
  plan.item_rows = std::max<int64_t>(kTileRows, std::min(kItemRows, share));
  int64_t whole_items = 0;
  for (int64_t s = 0; s < sequences; ++s)
    whole_items += ((p.seq_start[s + 1] - p.seq_start[s]) * p.group + plan.item_rows - 1) / plan.item_rows * heads;
  const bool split_keys = threads > 1 && whole_items < 2 * threads;
  for (int64_t s = 0; s < sequences; ++s) {
    const int64_t tokens = p.seq_start[s + 1] - p.seq_start[s], rows = tokens * p.group;
    const Rows where{p.context_len[s] - tokens, p.group, p.window};
    // Late rows see the most keys: they go first, so that the short items fill the end.
    for (int64_t end = rows; end > 0; end -= std::min(end, plan.item_rows)) {
      const int64_t begin = std::max<int64_t>(0, end - plan.item_rows);
      const Range reach = where.keys(begin, end);
      const int64_t first = reach.begin / kSplit, last = (reach.end + kSplit - 1) / kSplit;
      for (int64_t head = 0; head < heads; ++head) {
        if (!split_keys || last - first == 1) {
          plan.items.push_back({s, head, begin, end, first, last, -1});
          continue;
        }
        plan.merges.push_back({s, head, begin, end, first, last, plan.partial_rows});
        for (int64_t split = first; split < last; ++split, plan.partial_rows += end - begin)
          plan.items.push_back({s, head, begin, end, split, split + 1, plan.partial_rows});
      }
    }
  }
  return plan;
}

template <class T>
void merge_item(const Problem& p, const Item& item, const State& partials) {
  const int64_t count = item.row_end - item.row_begin;
  for (int64_t r = 0; r < count; ++r) {
    // The first split's partial collects the others.
    State whole = partials;
    for (int64_t split = 1; split < item.split_end - item.split_begin; ++split)
      whole.merge(item.partial + r, partials, item.partial + split * count + r);
    write_row<T>(p, item, item.row_begin + r, whole, item.partial + r);
  }
}

template <class T>
void attend(const Problem& p, int64_t tokens) {
  const int64_t used = p.seq_start[p.slot.size];
  const int64_t row_elements = p.q.sizes[1] * p.cache.head_dim;
  std::memset(static_cast<T*>(p.out) + used * row_elements, 0, (tokens - used) * row_elements * sizeof(T));
  int64_t work = 0;
  for (int64_t s = 0; s < p.slot.size; ++s)
    work += (p.seq_start[s + 1] - p.seq_start[s]) * p.context_len[s] * row_elements;
  const int threads = threads_for(work);
  const Plan plan = make_plan(p, threads);
  static thread_local Scratch scratch;
  const int64_t thread_bytes = Buffers::align(Buffers::bytes(p, plan.item_rows));
  const int64_t partial_bytes = State::bytes(plan.partial_rows, p.padded_dim);
  char* memory = scratch.get<char>(size_t(threads * thread_bytes + partial_bytes + 64));
  State partials(memory + threads * thread_bytes, plan.partial_rows, p.padded_dim);
  partials.clear(0, plan.partial_rows);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const Buffers buffers(memory + omp_get_thread_num() * thread_bytes, p, plan.item_rows);
    // Elements past head_dim are read by the tiles and must be finite.
    std::memset(buffers.values, 0, kKeys * p.padded_dim * 4);
#pragma omp for schedule(dynamic, 1)
    for (size_t i = 0; i < plan.items.size(); ++i) run_item<T>(p, plan.items[i], buffers, partials);
#pragma omp for schedule(static)
    for (size_t i = 0; i < plan.merges.size(); ++i) merge_item<T>(p, plan.merges[i], partials);
  }
}

}  // namespace
}  // namespace xllm

using namespace xllm;

XLLM_EXPORT AOTITorchError aoti_torch_cpu_attention(AtenTensorHandle q_handle, AtenTensorHandle cache_handle,
                                                    AtenTensorHandle seq_start_handle,
                                                    AtenTensorHandle context_len_handle, AtenTensorHandle slot_handle,
                                                    double scale, int64_t window, AtenTensorHandle* ret0) {
  return run("attention", [&] {
    const View q("q", q_handle);
    const Cache cache(View("kv_cache", cache_handle));
    q.expect_dim(3).expect_dtype(cache.view.dtype).expect_size(2, cache.head_dim).expect_last_contiguous();
    check(q.sizes[1] >= 1 && q.sizes[1] % cache.heads == 0, "%lld query heads, not a multiple of %lld key/value heads",
          (long long)q.sizes[1], (long long)cache.heads);
    const View starts("seq_start", seq_start_handle), slots("slot", slot_handle);
    const Step step(q.sizes[0], starts, slots, cache);
    const Ints context_len(View("context_len", context_len_handle).expect_dim(1).expect_size(0, step.sequences));
    for (int64_t s = 0; s < step.sequences; ++s) {
      const int64_t tokens = step.seq_start[s + 1] - step.seq_start[s];
      check(tokens == 0 || (context_len[s] >= tokens && context_len[s] <= cache.max_tokens),
            "context_len[%lld] is %lld, expected from %lld (tokens of the step) to %lld (tokens a slot holds)",
            (long long)s, (long long)context_len[s], (long long)tokens, (long long)cache.max_tokens);
    }
    Output out({q.sizes[0], q.sizes[1], q.sizes[2]}, q.dtype);
    dispatch(q, [&](auto tag) {
      using T = decltype(tag);
      const int64_t padded = (cache.head_dim + kTileColumns - 1) / kTileColumns * kTileColumns;
      const Problem problem{q,     cache,        step.seq_start,           context_len,
                            step.slot, q.sizes[1] / cache.heads, units_of<T>(cache.head_dim), padded,
                            float(scale), window, out.ptr<void>()};
      attend<T>(problem, q.sizes[0]);
    });
    out.release(ret0);
  });
}
