#include "parallel.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace xllm {
namespace {

// About 50 us: longer than the gaps between the kernels of a layer, short against a scheduler slice.
constexpr int kSpins = 2000;

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

void futex_wait(std::atomic<uint32_t>& word, uint32_t seen) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
}

void futex_wake_all(std::atomic<uint32_t>& word) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
}

// Spin, then sleep, until word is no longer `seen`.
uint32_t wait_while_equal(std::atomic<uint32_t>& word, std::atomic<uint32_t>& sleepers, uint32_t seen) {
  for (int spin = 0; spin < kSpins; ++spin) {
    const uint32_t now = word.load(std::memory_order_acquire);
    if (now != seen) return now;
    pause();
  }
  // Sequentially consistent with the waker's store and load: either it sees a sleeper, or we see its store.
  sleepers.fetch_add(1);
  uint32_t now;
  while ((now = word.load()) == seen) futex_wait(word, seen);
  sleepers.fetch_sub(1);
  return now;
}

void pin(pthread_t thread, int cpu) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cpu, &set);
  pthread_setaffinity_np(thread, sizeof set, &set);
}

// Where the workers stand when the pool has as many threads as the process has CPUs: each on a CPU of its own, and none
// on the caller's. One that the scheduler wakes there would wait until the caller has done its work for it.
//
// The caller is not pinned: the scheduler takes it away from a CPU that another thread of the process wants. Then the
// worker there changes places with it, or the two would share that CPU for as long as the caller is busy.
class Places {
 public:
  // Of these workers and the calling thread.
  void assign(const std::vector<pthread_t>& workers) {
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) != 0 || CPU_COUNT(&set) != int(workers.size()) + 1) return;
    cpus_.clear();
    callers_ = sched_getcpu();
    for (int cpu = callers_; cpus_.size() < workers.size();) {
      cpu = (cpu + 1) % CPU_SETSIZE;
      if (!CPU_ISSET(cpu, &set) || cpu == callers_) continue;
      pin(workers[cpus_.size()], cpu);
      cpus_.push_back(cpu);
    }
  }
  // For the calling thread.
  void make_way(const std::vector<pthread_t>& workers) {
    if (cpus_.empty()) return;
    const int here = sched_getcpu();
    if (here == callers_) return;
    for (size_t worker = 0; worker < cpus_.size(); ++worker) {
      if (cpus_[worker] != here) continue;
      pin(workers[worker], callers_);
      std::swap(cpus_[worker], callers_);
      return;
    }
  }

 private:
  // Of each worker; empty where they are not pinned.
  std::vector<int> cpus_;
  int callers_ = -1;
};

// A region is `threads` shares. Whoever is awake claims the next one, the caller included, so a worker that the
// scheduler brings late finds nothing left to do and nobody waits for it.
struct Pool {
  std::mutex busy;
  // They never end.
  std::vector<pthread_t> workers;
  Places places;
  ThreadFunction function = nullptr;
  void* argument = nullptr;
  alignas(64) std::atomic<uint32_t> round{0};
  std::atomic<uint32_t> sleeping_workers{0};
  // Round, number of shares and next share in one word: a claim is for one round and never past its end.
  alignas(64) std::atomic<uint64_t> ticket{0};
  alignas(64) std::atomic<uint32_t> remaining{0};
  std::atomic<uint32_t> sleeping_caller{0};

  static uint64_t first_ticket(uint32_t round, int threads, int next) {
    return uint64_t(round) << 32 | uint64_t(threads) << 16 | uint64_t(next);
  }

  void run_shares() {
    uint64_t seen = ticket.load(std::memory_order_acquire);
    while (true) {
      const int next = int(seen & 0xffff), threads = int(seen >> 16 & 0xffff);
      if (next >= threads) return;
      if (!ticket.compare_exchange_weak(seen, seen + 1, std::memory_order_acq_rel)) continue;
      // The claimed share keeps the region open, so function and argument stay as they are until it ends.
      function(argument, next, threads);
      if (remaining.fetch_sub(1) == 1 && sleeping_caller.load() > 0) futex_wake_all(remaining);
      seen = ticket.load(std::memory_order_acquire);
    }
  }

  void start_workers(int wanted) {
    if (int(workers.size()) >= wanted) return;
    while (int(workers.size()) < wanted) {
      std::thread worker([this, seen = round.load()] { work(seen); });
      workers.push_back(worker.native_handle());
      worker.detach();
    }
    places.assign(workers);
  }

  void work(uint32_t seen) {
    for (;;) {
      seen = wait_while_equal(round, sleeping_workers, seen);
      run_shares();
    }
  }

  void run(int wanted, ThreadFunction region, void* region_argument) {
    start_workers(wanted - 1);
    places.make_way(workers);
    function = region;
    argument = region_argument;
    remaining.store(uint32_t(wanted));
    const uint32_t next_round = round.load() + 1;
    ticket.store(first_ticket(next_round, wanted, 0), std::memory_order_release);
    round.store(next_round);
    if (sleeping_workers.load() > 0) futex_wake_all(round);
    run_shares();
    for (uint32_t left; (left = remaining.load(std::memory_order_acquire)) != 0;) {
      wait_while_equal(remaining, sleeping_caller, left);
    }
  }
};

// Never destroyed: workers outlive static destructors at process exit.
Pool* g_pool = new Pool;
std::atomic<int> g_max_threads{0};

// A forked child has none of the workers: it starts with an empty pool.
const int g_registered = pthread_atfork(nullptr, nullptr, [] { g_pool = new Pool; });

int available_cpus() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) != 0) return 1;
  return CPU_COUNT(&set);
}

}  // namespace

int max_threads() {
  const int chosen = g_max_threads.load(std::memory_order_relaxed);
  return chosen > 0 ? chosen : available_cpus();
}

// A ticket counts shares in 16 bits.
void set_max_threads(int threads) { g_max_threads.store(threads < 0x7fff ? threads : 0x7fff); }

void run_parallel(int threads, ThreadFunction function, void* argument) {
  Pool& pool = *g_pool;
  std::unique_lock<std::mutex> held(pool.busy, std::try_to_lock);
  if (!held.owns_lock()) {
    for (int thread = 0; thread < threads; ++thread) function(argument, thread, threads);
    return;
  }
  pool.run(threads, function, argument);
}

}  // namespace xllm

// Threads of the kernels from now on; 0 is every CPU this process may use.
extern "C" __attribute__((visibility("default"))) void xllm_set_max_threads(int threads) {
  xllm::set_max_threads(threads);
}
