// Draws one token from each row of logits, without sorting a vocabulary.
//
// Top-k, top-p and min-p keep the largest weights down to an edge, which is found by counting: a pass over the weights
// says how many there are at or above a few cuts, and what they weigh. The edge is between two of them, where the next
// pass looks, until so few are left that sorting them is quicker. Kept weights are then summed in the order of the token
// ids, and the token is the one in which the sum passes the uniform number's share of the total.
//
// One thread does a whole row, in fixed order: a row gives the same token alone or in a batch.
#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <limits>

#include "shim_util.h"

namespace xllm {
namespace {

// Weights that are summed as floats; sums of these are doubles.
constexpr int64_t kBlock = 1024, kMaxBlocks = 4096;
constexpr int kCuts = 4;
// As many are sorted rather than looked at once more.
constexpr int64_t kSortable = 256;
constexpr int64_t kAll = std::numeric_limits<int64_t>::max();

struct Options {
  // As in SamplingParams. uniform is in [0, 1).
  double temperature, top_k, top_p, min_p, uniform;
};

struct Tally {
  int64_t count = 0;
  double mass = 0;
};

// The weights above `edge`, and of those that equal it the first num_at_edge.
struct Kept {
  float edge = 0;
  int64_t num_at_edge = 0;
  double mass = 0;
};

int32_t bits_of(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

float float_of(int32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

XLLM_INLINE bool any(vi mask) {
#if defined(XLLM_AVX512)
  return _mm512_movepi32_mask((__m512i)mask) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)mask) != 0;
#else
  int32_t lanes = 0;
  for (int i = 0; i < kLanes; ++i) lanes |= mask[i];
  return lanes != 0;
#endif
}

XLLM_INLINE int64_t total(vi counts) {
  int64_t sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += counts[i];
  return sum;
}

XLLM_INLINE vf where(vi mask, vf values) { return (vf)((vi)values & mask); }

float largest(const float* row, int64_t count) {
  vf best = splat(-std::numeric_limits<float>::infinity());
  const int64_t whole = count / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) best = max(best, load(row + i));
  float most = max(best);
  for (int64_t i = whole; i < count; ++i) most = std::max(most, row[i]);
  return most;
}

// The weights of one row, in [0, 1] and 1 for the most probable token, padded with zeros to whole vectors.
class Weights {
 public:
  // memory has room for padded(vocab_size) floats.
  Weights(const float* row, int64_t vocab_size, float most, float temperature, float* memory)
      : values_(memory), size_(padded(vocab_size)) {
    const vf scale = splat(1.0f / temperature), best = splat(most);
    for (int64_t begin = 0; begin < vocab_size; begin += kBlock) {
      vf block{};
      for_vectors(std::min(kBlock, vocab_size - begin), [&](int64_t i, int64_t n) {
        vf w = exp((load_n(row + begin + i, n) - best) * scale);
        if (n < kLanes) {
          store_part(values_ + begin + i, w, n);
          std::fill(values_ + vocab_size, values_ + size_, 0.0f);
          w = load(values_ + begin + i);
        } else {
          store(values_ + begin + i, w);
        }
        block += w;
      });
      mass_ += double(sum(block));
    }
  }

  static int64_t padded(int64_t vocab_size) { return (vocab_size + kLanes - 1) / kLanes * kLanes; }

  // NaN where a logit is.
  double mass() const { return mass_; }

  // The shortest prefix of the weights in descending order that is_enough(Tally); all from `least` on if none is.
  template <class F>
  Kept prefix(float least, F is_enough) const {
    // Bits of positive floats ascend with their values. The prefix ends in [low, high).
    int32_t low = bits_of(least), high = bits_of(1.0f) + 1;
    Tally above;
    int64_t num_inside;
    // Most often the edge is above these: a model is sure of its few best tokens.
    std::array<float, kCuts> cuts{least, std::max(least, 0x1p-14f), std::max(least, 0x1p-9f), std::max(least, 0x1p-5f)};
    do {
      const auto found = tally(cuts);
      if (!is_enough(found[0])) return {least, kAll, found[0].mass};
      // The lowest cut is enough, now as ever.
      int c = kCuts - 1;
      for (; c > 0 && !is_enough(found[c]); --c) {
        high = bits_of(cuts[c]);
        above = found[c];
      }
      low = bits_of(cuts[c]);
      num_inside = found[c].count - above.count;
      for (c = 0; c < kCuts; ++c) cuts[c] = float_of(low + int32_t(int64_t(high - low) * c / kCuts));
    } while (num_inside > kSortable && high - low > 1);
    return high - low > 1 ? sorted_prefix(float_of(low), float_of(high), above, is_enough)
                          : prefix_of_equals(float_of(low), above, is_enough);
  }

  // The index in which the sum of the kept weights passes `uniform` times their total.
  int64_t draw(const Kept& kept, double uniform) const {
    double until[kMaxBlocks];
    int64_t left[kMaxBlocks];
    double mass = 0;
    int64_t left_at_edge = kept.num_at_edge, num_blocks = 0;
    for (int64_t begin = 0; begin < size_; begin += kBlock, ++num_blocks) {
      vf above{};
      vi at_edge{};
      for (int64_t i = begin; i < std::min(begin + kBlock, size_); i += kLanes) {
        const vf w = load(values_ + i);
        above += where(w > splat(kept.edge), w);
        at_edge -= w == splat(kept.edge);
      }
      const int64_t taken = std::min(left_at_edge, total(at_edge));
      left[num_blocks] = left_at_edge;
      left_at_edge -= taken;
      mass += double(sum(above)) + double(taken) * double(kept.edge);
      until[num_blocks] = mass;
    }
    // uniform is 1 - 2^-53 at most, so this rounds to less than the total: some block ends above it.
    const double target = uniform * mass;
    const int64_t block = std::upper_bound(until, until + num_blocks, target) - until;
    return walk(kept, left[block], block * kBlock, block == 0 ? 0.0 : until[block - 1], target);
  }

 private:
  // Of the weights at or above each cut.
  std::array<Tally, kCuts> tally(const std::array<float, kCuts>& cuts) const {
    std::array<Tally, kCuts> found{};
    for (int64_t begin = 0; begin < size_; begin += kBlock) {
      vf mass[kCuts] = {};
      vi count[kCuts] = {};
      for (int64_t i = begin; i < std::min(begin + kBlock, size_); i += kLanes) {
        const vf w = load(values_ + i);
        for (int c = 0; c < kCuts; ++c) {
          const vi is_above = w >= splat(cuts[c]);
          mass[c] += where(is_above, w);
          count[c] -= is_above;
        }
      }
      for (int c = 0; c < kCuts; ++c) {
        found[c].mass += double(sum(mass[c]));
        found[c].count += total(count[c]);
      }
    }
    return found;
  }

  // It ends in [low, high), where few are.
  template <class F>
  Kept sorted_prefix(float low, float high, const Tally& above, F is_enough) const {
    float inside[kSortable];
    int64_t count = 0;
    for (int64_t i = 0; i < size_; i += kLanes) {
      const vf w = load(values_ + i);
      if (!any((w >= splat(low)) & (w < splat(high)))) continue;
      for (int lane = 0; lane < kLanes; ++lane)
        if (w[lane] >= low && w[lane] < high) inside[count++] = w[lane];
    }
    std::sort(inside, inside + count, std::greater<float>());
    Tally tally = above;
    Kept kept;
    for (int64_t i = 0; i < count && !(i > 0 && is_enough(tally)); ++i) {
      kept = {inside[i], inside[i] == kept.edge ? kept.num_at_edge + 1 : 1, 0};
      tally = {tally.count + 1, tally.mass + double(inside[i])};
    }
    kept.mass = tally.mass;
    return kept;
  }

  // It ends among those that equal value: all of them are enough.
  template <class F>
  static Kept prefix_of_equals(float value, const Tally& above, F is_enough) {
    const auto with = [&](int64_t count) {
      return Tally{above.count + count, above.mass + double(count) * double(value)};
    };
    int64_t least = 1, most = int64_t(1) << 40;
    while (least < most) {
      const int64_t middle = (least + most) / 2;
      if (is_enough(with(middle)))
        most = middle;
      else
        least = middle + 1;
    }
    return {value, least, with(least).mass};
  }

  int64_t walk(const Kept& kept, int64_t left_at_edge, int64_t begin, double sum, double target) const {
    int64_t last = begin;
    for (int64_t i = begin; i < std::min(begin + kBlock, size_) && sum <= target; ++i) {
      const float w = values_[i];
      if (!(w > kept.edge || (w == kept.edge && left_at_edge > 0))) continue;
      left_at_edge -= w == kept.edge;
      sum += double(w);
      last = i;
    }
    // Summed in another order they may end a little below the block's sum.
    return last;
  }

  float* values_;
  int64_t size_;
  double mass_ = 0;
};

// -1 where the row holds a NaN or has no finite maximum.
int64_t draw_row(const float* row, int64_t vocab_size, const Options& options, float* memory) {
  const float most = largest(row, vocab_size);
  if (!(std::abs(most) <= std::numeric_limits<float>::max())) return -1;
  const Weights weights(row, vocab_size, most, float(options.temperature), memory);
  if (weights.mass() != weights.mass()) return -1;
  // What has no weight is never drawn.
  Kept kept{std::max(float(options.min_p), std::numeric_limits<float>::min()), kAll, weights.mass()};
  // Also where nothing but min-p filters: top-p goes by the mass of what it leaves.
  if (options.top_k > 0 || (options.min_p > 0 && options.top_p < 1)) {
    const double most_tokens = options.top_k > 0 ? options.top_k : double(vocab_size);
    kept = weights.prefix(kept.edge, [&](const Tally& tally) { return double(tally.count) >= most_tokens; });
  }
  if (options.top_p < 1) {
    const double wanted = options.top_p * kept.mass;
    const Kept inner = weights.prefix(kept.edge, [&](const Tally& tally) { return tally.mass >= wanted; });
    // With rounding it may go on among those at the edge.
    kept = {inner.edge, inner.edge == kept.edge ? std::min(inner.num_at_edge, kept.num_at_edge) : inner.num_at_edge, 0};
  }
  return weights.draw(kept, options.uniform);
}

}  // namespace
}  // namespace xllm

// rows: the addresses of vocab_size logits each. tokens [num_rows]: the indices drawn, -1 for a row that holds a NaN or
// has no finite maximum. Returns 0, or not, with a message in xllm_last_error.
XLLM_EXPORT int32_t xllm_draw(int64_t num_rows, int64_t vocab_size, const float* const* rows,
                              const xllm::Options* options, int64_t* tokens) {
  using namespace xllm;
  return run("draw", [&] {
    check(vocab_size > 0 && vocab_size <= kMaxBlocks * kBlock, "a vocabulary of %lld tokens, 1 to %lld are supported",
          static_cast<long long>(vocab_size), static_cast<long long>(kMaxBlocks * kBlock));
    const int threads = int(std::min<int64_t>(num_rows, threads_for(num_rows * vocab_size)));
    const int64_t size = Weights::padded(vocab_size);
    static thread_local Scratch scratch;
    float* const memory = scratch.get<float>(size_t(threads) * size_t(size) * sizeof(float));
    WorkQueue queue(num_rows);
    parallel(threads, [&](int thread, int) {
      for (int64_t row; (row = queue.next()) >= 0;)
        tokens[row] = draw_row(rows[row], vocab_size, options[row], memory + thread * size);
    });
  });
}
