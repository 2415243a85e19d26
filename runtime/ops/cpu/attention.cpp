// attention: causal grouped-query attention of packed tokens over the KV cache, for prefill and decode alike.
//
// All query heads of a key/value head form the rows of one product (row = token * group + head in group), so K and V
// are read once per key/value head. Sums do not depend on how the work is cut: blocks start at multiples of kKeys, the
// softmax runs online inside splits of kSplit keys, and the results of the splits are merged in ascending order, by the
// one thread that walked them all or, when there are fewer items than threads, in a second pass over shared partials.
#include "attention_amx.h"
#include "attention_state.h"
#include "attention_tile.h"

#include <vector>

namespace xllm {
namespace {

// Row tiles of one prefill item: amortises the preparation of a key block (about 4% of its products).
constexpr int64_t kItemTiles = 16;
// Keys and values of a block that a decode item takes at once, over several heads: tokens are then read in the order
// they lie in memory. A quarter of a 1 MiB L2, which also holds the next block.
constexpr int64_t kBlockBytes = 256 * 1024;

// Rows of the query buffer for the `rows` rows of a head.
int64_t query_rows(const Problem& p, int64_t rows) {
  return p.pads_queries ? (rows + p.row_tile - 1) / p.row_tile * p.row_tile : rows;
}

template <class T>
void load_queries(const Problem& p, const Item& item, int64_t head, int64_t tiles, uint32_t* to) {
  const int64_t first_token = p.seq_start[item.sequence];
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const Span span = even_span(item.rows(), tiles, tile);
    const T* rows[kMaxRowTile];
    for (int64_t r = span.begin; r < span.end; ++r) {
      const int64_t row = item.row_begin + r;
      rows[r - span.begin] = p.q.ptr<const T>() + (first_token + row / p.group) * p.q.strides[0] +
                             (head * p.group + row % p.group) * p.q.strides[1];
    }
    const int height = int(span.end - span.begin);
    const int64_t pitch = p.pads_queries ? p.row_tile : height;
    transpose_units(rows, height, p.cache.head_dim, to, pitch);
    to += pitch * p.units;
  }
}

// Writes the rows of an item from their states, which start at `first` of `state`.
template <class T>
void write_rows(const Problem& p, const Item& item, const State& state, int64_t first) {
  const int64_t width = p.cache.head_dim;
  for (int64_t i = 0; i < item.states(); ++i) {
    const int64_t row = item.row_begin + i % item.rows(), head = item.head_begin + i / item.rows();
    const int64_t token = p.seq_start[item.sequence] + row / p.group;
    T* to = static_cast<T*>(p.out) + (token * p.q.sizes[1] + head * p.group + row % p.group) * width;
    const float inverse = 1.0f / sum(state.total[first + i]);
    const float* from = state.out + (first + i) * state.width;
    for_vectors(width, [&](int64_t d, int64_t n) { store_n(to + d, load(from + d) * inverse, n); });
  }
}

template <class T, class C>
void run_block(const Problem& p, const Item& item, const Buffers& b, const Rows& rows, Range keys, Ahead& ahead) {
  const int64_t tiles = (item.rows() + kTileRows - 1) / kTileRows;
  const bool narrow = tiles == 1 && p.padded_dim == p.cache.head_dim;
  for (int64_t h = 0; h < item.heads(); ++h) {
    const Block block{p, b, rows, p.slot[item.sequence], item.head_begin + h, keys, ahead};
#if defined(XLLM_AMX)
    if (p.pads_queries) {
      run_tiles(block, item, h);
      continue;
    }
#endif
    constexpr bool kHasCodes = sizeof(C) != sizeof(T);
    if constexpr (kHasCodes) load_scales(block);
    if (!narrow) {
      load_keys<T, C>(block);
      if constexpr (kHasCodes)
        unpack_values<T>(block);
      else
        load_values(p, block.slot, block.head, keys, b.values, T{});
    }
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const Span span = even_span(item.rows(), tiles, tile);
      const int64_t row = item.row_begin + span.begin;
      const Range seen = rows.keys(row, item.row_begin + span.end);
      if (seen.end <= keys.begin || seen.begin >= keys.end) continue;
      const auto kernel =
          block_kernel<T, C>(narrow, span.end - span.begin, std::make_integer_sequence<int, kTileRows>());
      kernel(block, row, h * item.rows() + span.begin);
    }
  }
}

Rows rows_of(const Problem& p, int64_t sequence) {
  const int64_t tokens = p.seq_start[sequence + 1] - p.seq_start[sequence];
  return {p.context_len[sequence] - tokens, p.group, p.window};
}

// From the beginning of its first block on.
Range keys_of(const Problem& p, const Item& item) {
  const Range reach = rows_of(p, item.sequence).keys(item.row_begin, item.row_end);
  return {std::max(item.split_begin * kSplit, reach.begin / kKeys * kKeys),
          std::min(reach.end, item.split_end * kSplit)};
}

template <class C>
Stream first_block(const Problem& p, const Item& item) {
  const Range keys = keys_of(p, item);
  return Stream::of<C>(p, item, keys.begin, std::min(keys.begin + kKeys, keys.end));
}

// `ahead.next` has what is left to fetch of the item's first block.
template <class T, class C>
void run_item(const Problem& p, const Item& item, const Item* following, const Buffers& b, State& partials,
              Ahead& ahead) {
  const int64_t tiles = (item.rows() + p.row_tile - 1) / p.row_tile;
  const Rows rows = rows_of(p, item.sequence);
  State split = b.split, whole = b.whole;
  const auto [first, limit] = keys_of(p, item);
  ahead.next.step(kKeys * ahead.next.lines_per_token());
  ahead.rest = first + kKeys < limit ? Stream::of<C>(p, item, first + kKeys, limit) : Stream();
  ahead.next = following ? first_block<C>(p, *following) : Stream();
  for (int64_t h = 0; h < item.heads(); ++h)
    load_queries<T>(p, item, item.head_begin + h, tiles, b.queries + h * query_rows(p, item.rows()) * p.units);
  whole.clear(0, item.states());
  for (int64_t s = item.split_begin; s < item.split_end; ++s) {
    split.clear(0, item.states());
    const int64_t end = std::min(limit, (s + 1) * kSplit);
    for (int64_t key = std::max(first, s * kSplit); key < end; key += kKeys)
      run_block<T, C>(p, item, b, rows, {key, std::min(key + kKeys, end)}, ahead);
    State& into = item.partial >= 0 ? partials : whole;
    for (int64_t i = 0; i < item.states(); ++i) into.merge(std::max<int64_t>(item.partial, 0) + i, split, i);
  }
  if (item.partial < 0) write_rows<T>(p, item, whole, 0);
}

// Cuts a step into items.
struct Plan {
  std::vector<Item> items, merges;
  // Rows of shared partial state, and the most state rows of an item.
  int64_t partials = 0, states = 0;
};

struct Cut {
  int64_t rows, heads;
  bool split_keys;
};

Plan cut_step(const Problem& p, const Cut& cut) {
  Plan plan;
  for (int64_t s = 0; s < p.slot.size; ++s) {
    const int64_t tokens = p.seq_start[s + 1] - p.seq_start[s], rows = tokens * p.group;
    const Rows where{p.context_len[s] - tokens, p.group, p.window};
    const int64_t heads = rows <= p.row_tile ? cut.heads : 1;
    // Late rows see the most keys: they go first, so that the short items fill the end.
    for (int64_t end = rows; end > 0; end -= std::min(end, cut.rows)) {
      const int64_t begin = std::max<int64_t>(0, end - cut.rows);
      const Range reach = where.keys(begin, end);
      const int64_t first = reach.begin / kSplit, last = (reach.end + kSplit - 1) / kSplit;
      for (int64_t head = 0; head < p.cache.heads; head += heads) {
        Item item{s, head, std::min(head + heads, p.cache.heads), begin, end, first, last, -1};
        plan.states = std::max(plan.states, item.heads() * query_rows(p, item.rows()));
        if (!cut.split_keys || last - first == 1) {
          plan.items.push_back(item);
          continue;
        }
        item.partial = plan.partials;
        plan.merges.push_back(item);
        for (int64_t split = first; split < last; ++split, plan.partials += item.states())
          plan.items.push_back({s, item.head_begin, item.head_end, begin, end, split, split + 1, plan.partials});
      }
    }
  }
  return plan;
}

// Large pieces read memory in the longest runs and transpose a key block for the most rows; they are cut smaller, keys
// first, then heads, until every thread has two.
Plan make_plan(const Problem& p, int threads) {
  const int64_t rows = p.seq_start[p.slot.size] * p.group * p.cache.heads / (4 * threads) / p.row_tile * p.row_tile;
  const int64_t head_bytes = kKeys * p.units * 8;
  Cut cut{std::max(p.row_tile, std::min(kItemTiles * p.row_tile, rows)),
          std::max<int64_t>(1, std::min(p.cache.heads, kBlockBytes / head_bytes)), false};
  Plan plan = cut_step(p, cut);
  const size_t wanted = threads == 1 ? 1 : size_t(2 * threads);
  if (plan.items.size() < wanted) {
    cut.split_keys = true;
    plan = cut_step(p, cut);
  }
  while (plan.items.size() < wanted && cut.heads > 1) {
    cut.heads = (cut.heads + 1) / 2;
    plan = cut_step(p, cut);
  }
  return plan;
}

template <class T>
void merge_item(const Problem& p, const Item& item, State& partials) {
  // The first split's states collect the others.
  for (int64_t split = 1; split < item.split_end - item.split_begin; ++split)
    for (int64_t i = 0; i < item.states(); ++i)
      partials.merge(item.partial + i, partials, item.partial + split * item.states() + i);
  write_rows<T>(p, item, partials, item.partial);
}

template <class T, class C>
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
  // Room for one more tile: tiles are read and written back whole.
  const int64_t states = plan.states + kMaxRowTile;
  const int64_t thread_bytes = Buffers::align(Buffers::bytes(p, states));
  char* memory = scratch.get<char>(size_t(threads * thread_bytes + State::bytes(plan.partials, p.padded_dim) + 64));
  State partials(memory + threads * thread_bytes, plan.partials, p.padded_dim);
  partials.clear(0, plan.partials);
  WorkQueue queue(int64_t(plan.items.size()));
  parallel(threads, [&](int thread, int) {
    const Buffers buffers(memory + thread * thread_bytes, p, states);
    // Elements past head_dim are read by the tiles and must be finite.
    std::memset(buffers.values, 0, kKeys * p.padded_dim * 4);
    std::memset(buffers.zeros, 0, p.padded_dim * 4);
    std::fill(buffers.key_scales, buffers.key_scales + kKeys, p.scale);
    std::fill(buffers.value_scales, buffers.value_scales + kKeys, 1.0f);
#if defined(XLLM_AMX)
    if (p.pads_queries) configure_tiles(kTileSide, kTileSide);
#endif
    const auto claim = [&] {
      const int64_t item = queue.next();
      return item < 0 ? nullptr : &plan.items[item];
    };
    Ahead ahead;
    const Item *item = claim(), *following;
    if (item) ahead.next = first_block<C>(p, *item);
    for (; item; item = following) {
      following = claim();
      run_item<T, C>(p, *item, following, buffers, partials, ahead);
    }
#if defined(XLLM_AMX)
    if (p.pads_queries) _tile_release();
#endif
  });
  const int64_t merges = int64_t(plan.merges.size());
  parallel_for(merges > 1 ? threads : 1, merges, [&](int64_t i) { merge_item<T>(p, plan.merges[i], partials); });
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
    cache.expect_kind_of(q).expect_dim(3).expect_size(2, cache.head_dim).expect_last_contiguous();
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
      Problem problem{q,     cache,        step.seq_start,           context_len,
                      step.slot, q.sizes[1] / cache.heads, units_of<T>(cache.head_dim), padded,
                      float(scale), window, out.ptr<void>()};
#if defined(XLLM_AMX)
      // Codes would have to be copied for tiles; they take the vector registers.
      if (kPair<T> == 2 && !cache.is_int8 && cache.head_dim % (2 * kTileUnits) == 0) {
        require_tiles();
        problem.row_tile = kTileSide;
        problem.pads_queries = true;
      }
#endif
      if (cache.is_int8)
        attend<T, int8_t>(problem, q.sizes[0]);
      else
        attend<T, T>(problem, q.sizes[0]);
    });
    out.release(ret0);
  });
}
