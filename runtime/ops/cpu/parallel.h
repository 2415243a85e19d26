// Run a function on every thread of the kernels' own pool.
//
// Not OpenMP: libgomp's workers either spin for milliseconds, which starves the server's other threads and, with one
// core taken by another process, stretches every barrier to a scheduler slice; or sleep at once, which costs a wake-up
// between any two kernels of a layer. Here workers spin for about the time between two kernels, then sleep.
#pragma once

#include <atomic>
#include <cstdint>

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

}  // namespace xllm
