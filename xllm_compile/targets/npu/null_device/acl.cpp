// A null Ascend device, the ACL half: memory is address space of the host, streams and events are numbers, nothing is
// ever computed. Enough for torch_npu to initialise, allocate and hand a graph to the compiler on a machine without an
// NPU and without CANN. Functions that are not here are trampolines made by build.py: they trace their name and return 0.
#include <sys/mman.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

#include "acl/acl.h"
#include "acl/acl_op_compiler.h"
#include "acl/acl_rt.h"

namespace {

// Of an Ascend 910B: what torch_npu asks for at initialisation.
constexpr const char *kSocName = "Ascend910B3";
constexpr int64_t kCubeCores = 20, kVectorCores = 40;
// Far beyond any real device: graphs are compiled for a KV cache of which only the addresses are taken.
constexpr size_t kMemoryBytes = size_t(1) << 46;

std::mutex mutex;
std::map<void *, size_t> allocations;

// One line per call to the file that XLLM_NULL_NPU_TRACE names.
void trace(const char *format, ...) {
  static FILE *file = [] {
    const char *path = std::getenv("XLLM_NULL_NPU_TRACE");
    return path ? std::fopen(path, "a") : nullptr;
  }();
  if (!file) return;
  std::lock_guard<std::mutex> lock(mutex);
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(file, format, arguments);
  va_end(arguments);
  std::fputc('\n', file);
  std::fflush(file);
}

// Address space without memory behind it: pages arrive only if something writes, and nothing does.
aclError allocate(void **pointer, size_t num_bytes) {
  size_t size = num_bytes ? num_bytes : 1;
  void *address = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (address == MAP_FAILED) return ACL_ERROR_BAD_ALLOC;
  std::lock_guard<std::mutex> lock(mutex);
  allocations[*pointer = address] = size;
  return ACL_SUCCESS;
}

aclError release(void *pointer) {
  std::lock_guard<std::mutex> lock(mutex);
  auto found = allocations.find(pointer);
  if (found != allocations.end()) {
    munmap(pointer, found->second);
    allocations.erase(found);
  }
  return ACL_SUCCESS;
}

aclError new_handle(void **handle) {
  static uintptr_t last = 0;
  std::lock_guard<std::mutex> lock(mutex);
  *handle = reinterpret_cast<void *>(0x1000 + 16 * ++last);
  return ACL_SUCCESS;
}

}  // namespace

extern "C" {

// Where every trampoline ends.
int64_t null_npu_call(const char *name) {
  trace("%s", name);
  return 0;
}

const char *aclrtGetSocName() { return kSocName; }
const char *aclGetRecentErrMsg() { return ""; }

aclError aclrtGetDeviceCount(uint32_t *count) {
  *count = 1;
  return ACL_SUCCESS;
}
aclError aclrtGetDevice(int32_t *device) {
  *device = 0;
  return ACL_SUCCESS;
}
aclError aclrtGetCurrentContext(aclrtContext *context) {
  *context = reinterpret_cast<void *>(1);
  return ACL_SUCCESS;
}
aclError aclrtGetMemInfo(aclrtMemAttr, size_t *free_bytes, size_t *total_bytes) {
  *free_bytes = *total_bytes = kMemoryBytes;
  return ACL_SUCCESS;
}
aclError aclrtGetDeviceInfo(uint32_t, aclrtDevAttr attribute, int64_t *value) {
  *value = attribute == ACL_DEV_ATTR_VECTOR_CORE_NUM ? kVectorCores : kCubeCores;
  return ACL_SUCCESS;
}
aclError aclGetDeviceCapability(uint32_t, aclDeviceInfo what, int64_t *value) {
  *value = what == ACL_DEVICE_INFO_VECTOR_CORE_NUM ? kVectorCores : kCubeCores;
  return ACL_SUCCESS;
}

aclError aclrtMalloc(void **pointer, size_t num_bytes, aclrtMemMallocPolicy) {
  trace("aclrtMalloc %zu", num_bytes);
  return allocate(pointer, num_bytes);
}
aclError aclrtMallocAlign32(void **pointer, size_t num_bytes, aclrtMemMallocPolicy policy) {
  return aclrtMalloc(pointer, num_bytes, policy);
}
aclError aclrtFree(void *pointer) { return release(pointer); }
aclError aclrtMallocHost(void **pointer, size_t num_bytes) { return allocate(pointer, num_bytes); }
aclError aclrtFreeHost(void *pointer) { return release(pointer); }

aclError aclrtCreateStream(aclrtStream *stream) { return new_handle(stream); }
aclError aclrtCreateStreamWithConfig(aclrtStream *stream, uint32_t, uint32_t) { return new_handle(stream); }
aclError aclrtStreamQuery(aclrtStream, aclrtStreamStatus *status) {
  *status = ACL_STREAM_STATUS_COMPLETE;
  return ACL_SUCCESS;
}
aclError aclrtCreateEventExWithFlag(aclrtEvent *event, uint32_t) { return new_handle(event); }
aclError aclrtCreateEventWithFlag(aclrtEvent *event, uint32_t) { return new_handle(event); }
aclError aclrtQueryEventStatus(aclrtEvent, aclrtEventRecordedStatus *status) {
  *status = ACL_EVENT_RECORDED_STATUS_COMPLETE;
  return ACL_SUCCESS;
}

size_t aclGetCompileoptSize(aclCompileOpt) { return 64; }
aclError aclGetCompileopt(aclCompileOpt, char *value, size_t size) {
  std::snprintf(value, size, "0");
  return ACL_SUCCESS;
}
}
