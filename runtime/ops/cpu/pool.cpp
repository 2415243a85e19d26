// The activation pool: what compiled graphs and kernels allocate during a step comes from one reserved range, best fit,
// lowest address first, so that graphs run one after the other use the same pages and no step pays for page faults.
//
// It stands in for torch's CPU allocator, for threads that asked for it (xllm_pool_enter); everybody else, and what does
// not fit, gets torch's own. A block is free again when its tensor is, whoever holds it and however long.
// xllm_compile/graph_passes/memory_plan.py has the same arithmetic and predicts the peak.
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <sys/mman.h>

#include <algorithm>
#include <map>
#include <mutex>

#include "shim_util.h"

namespace xllm {
namespace {

constexpr size_t kAlignment = 64;
// Of addresses, not of memory: no step comes near it.
constexpr size_t kRange = size_t(64) << 30;

thread_local bool in_step = false;

class ActivationPool final : public c10::Allocator {
 public:
  // False when the memory cannot be had; the pool then stays as large as it was.
  bool reserve(size_t bytes) {
    std::lock_guard<std::mutex> lock(mutex_);
    bytes = (bytes + 4095) / 4096 * 4096;
    if (bytes <= capacity_) return true;
    if (bytes > kRange) return false;
    if (base_ == nullptr) {
      // The range never moves: whether a pointer is the pool's is asked for every tensor that is freed, without a lock.
      void* range = mmap(nullptr, kRange, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (range == MAP_FAILED) return false;
      base_ = static_cast<char*>(range);
      torch_ = c10::GetCPUAllocator();
      c10::SetCPUAllocator(this, /*priority=*/1);
    }
    if (mprotect(base_, bytes, PROT_READ | PROT_WRITE) != 0) return false;
    add_hole(capacity_, bytes - capacity_);
    capacity_ = bytes;
    return true;
  }

  c10::DataPtr allocate(size_t bytes) override {
    void* block = in_step && bytes > 0 ? take((bytes + kAlignment - 1) / kAlignment * kAlignment) : nullptr;
    if (block == nullptr) block = torch_->raw_allocate(bytes);
    return {block, block, &give_back, c10::Device(c10::DeviceType::CPU)};
  }

  // torch's own kernels also allocate and free without a tensor around it.
  c10::DeleterFnPtr raw_deleter() const override { return &give_back; }

  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

  void stats(int64_t* capacity, int64_t* in_use, int64_t* peak, int64_t* overflow) {
    std::lock_guard<std::mutex> lock(mutex_);
    *capacity = int64_t(capacity_), *in_use = int64_t(in_use_), *peak = int64_t(peak_), *overflow = overflow_;
  }

  void reset_peak() {
    std::lock_guard<std::mutex> lock(mutex_);
    peak_ = 0;
    for (const auto& [offset, size] : used_) peak_ = std::max(peak_, offset + size);
  }

 private:
  static void give_back(void* block);

  void* take(size_t bytes) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto best = free_.end();
    for (auto hole = free_.begin(); hole != free_.end(); ++hole) {
      if (hole->second >= bytes && (best == free_.end() || hole->second < best->second)) best = hole;
    }
    if (best == free_.end()) {
      ++overflow_;
      return nullptr;
    }
    const size_t offset = best->first, rest = best->second - bytes;
    free_.erase(best);
    if (rest > 0) free_[offset + bytes] = rest;
    used_[offset] = bytes;
    in_use_ += bytes;
    peak_ = std::max(peak_, offset + bytes);
    return base_ + offset;
  }

  void free(void* block) {
    std::lock_guard<std::mutex> lock(mutex_);
    const size_t offset = static_cast<char*>(block) - base_;
    const auto used = used_.find(offset);
    const size_t size = used->second;
    used_.erase(used);
    in_use_ -= size;
    add_hole(offset, size);
  }

  // Joined with its neighbours; the lock is held.
  void add_hole(size_t offset, size_t size) {
    auto [hole, _] = free_.emplace(offset, size);
    if (auto next = std::next(hole); next != free_.end() && hole->first + hole->second == next->first) {
      hole->second += next->second;
      free_.erase(next);
    }
    if (hole != free_.begin()) {
      if (auto before = std::prev(hole); before->first + before->second == hole->first) {
        before->second += hole->second;
        free_.erase(hole);
      }
    }
  }

  std::mutex mutex_;
  c10::Allocator* torch_ = nullptr;
  char* base_ = nullptr;
  size_t capacity_ = 0, in_use_ = 0, peak_ = 0;
  int64_t overflow_ = 0;
  std::map<size_t, size_t> free_, used_;  // offset -> bytes
};

// Never destroyed: tensors may outlive everything here.
ActivationPool& pool() {
  static auto* instance = new ActivationPool;
  return *instance;
}

void ActivationPool::give_back(void* block) {
  ActivationPool& self = pool();
  const char* at = static_cast<char*>(block);
  if (at >= self.base_ && at < self.base_ + kRange)
    self.free(block);
  else
    self.torch_->raw_deallocate(block);
}

}  // namespace
}  // namespace xllm

XLLM_EXPORT int32_t xllm_pool_reserve(int64_t bytes) { return xllm::pool().reserve(size_t(bytes)) ? 0 : 1; }
XLLM_EXPORT void xllm_pool_enter() { xllm::in_step = true; }
XLLM_EXPORT void xllm_pool_leave() { xllm::in_step = false; }
XLLM_EXPORT void xllm_pool_reset_peak() { xllm::pool().reset_peak(); }
XLLM_EXPORT void xllm_pool_stats(int64_t* capacity, int64_t* in_use, int64_t* peak, int64_t* overflow) {
  xllm::pool().stats(capacity, in_use, peak, overflow);
}
