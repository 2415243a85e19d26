// Run a function on every thread of the kernels' own pool.
//
// Not OpenMP: libgomp's workers either spin for milliseconds, which starves the server's other threads and, with one
// core taken by another process, stretches every barrier to a scheduler slice; or sleep at once, which costs a wake-up
// between any two kernels of a layer. Here workers spin for about the time between two kernels, then sleep.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>

namespace xllm {

using ThreadFunction = void (*)(void* argument, int thread, int threads);

// Threads the next parallel region may use, the caller included.
int max_threads();
void set_max_threads(int threads);

// Calls function(argument, t, threads) once for each t in [0, threads), on the caller and on whichever workers are awake
// in time; returns when all have ended.
// A second caller, while the pool is busy, runs all of its shares itself.
void run_parallel(int threads, ThreadFunction function, void* argument);

// body(thread, threads) on `threads` threads.
template <typename Body>
void parallel(int threads, Body&& body) {
  if (threads <= 1) {
    body(0, 1);
    return;
  }
  run_parallel(
      threads, [](void* argument, int thread, int total) { (*static_cast<Body*>(argument))(thread, total); }, &body);
}

// body(index) for index in [0, count), in equal contiguous shares.
template <typename Body>
void parallel_for(int threads, int64_t count, Body&& body) {
  parallel(threads, [&](int thread, int total) {
    const int64_t begin = count * thread / total, end = count * (thread + 1) / total;
    for (int64_t index = begin; index < end; ++index) body(index);
  });
}

// Indices handed out one at a time, for shares of unequal work. Made by the caller before the region, shared in it.
class WorkQueue {
 public:
  explicit WorkQueue(int64_t count) : count_(count) {}
  // The next index, or -1 when none is left.
  int64_t next() {
    const int64_t index = at_.fetch_add(1, std::memory_order_relaxed);
    return index < count_ ? index : -1;
  }

 private:
  const int64_t count_;
  std::atomic<int64_t> at_{0};
};

// The same for work that streams through memory: every thread walks a range of its own in ascending order, and one that
// is through takes over the second half of what it finds another to have left. 2^31 indices at most.
class RangeQueue {
 public:
  RangeQueue(int64_t count, int threads) : threads_(threads), ranges_(new Range[size_t(threads)]) {
    for (int t = 0; t < threads; ++t)
      ranges_[t].bounds.store(pack(count * t / threads, count * (t + 1) / threads), std::memory_order_relaxed);
  }
  // The next index for thread `thread` of the region, or -1 when none is left.
  int64_t next(int thread) {
    std::atomic<uint64_t>& own = ranges_[thread].bounds;
    uint64_t seen = own.load(std::memory_order_relaxed);
    while (begin_of(seen) < end_of(seen))
      if (own.compare_exchange_weak(seen, pack(begin_of(seen) + 1, end_of(seen)), std::memory_order_relaxed))
        return begin_of(seen);
    for (int step = 1; step < threads_; ++step) {
      std::atomic<uint64_t>& other = ranges_[(thread + step) % threads_].bounds;
      seen = other.load(std::memory_order_relaxed);
      while (begin_of(seen) < end_of(seen)) {
        const int64_t begin = begin_of(seen), end = end_of(seen), middle = begin + (end - begin) / 2;
        if (!other.compare_exchange_weak(seen, pack(begin, middle), std::memory_order_relaxed)) continue;
        // Nobody else writes an empty range.
        own.store(pack(middle + 1, end), std::memory_order_relaxed);
        return middle;
      }
    }
    return -1;
  }

 private:
  // Each on a cache line of its own.
  struct alignas(64) Range {
    std::atomic<uint64_t> bounds;
  };
  static uint64_t pack(int64_t begin, int64_t end) { return uint64_t(begin) << 32 | uint64_t(end); }
  static int64_t begin_of(uint64_t bounds) { return int64_t(bounds >> 32); }
  static int64_t end_of(uint64_t bounds) { return int64_t(bounds & 0xffffffffu); }
  const int threads_;
  const std::unique_ptr<Range[]> ranges_;
};

}  // namespace xllm
