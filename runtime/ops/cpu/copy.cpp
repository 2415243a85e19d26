// Copies memory that nobody reads soon: stores past the caches, which saves reading the target first and leaves the
// caches to the model.
#include "shim_util.h"
#include "vec.h"

namespace xllm {
namespace {

// What is smaller may well be read from the cache by whoever waits for it.
constexpr int64_t kStreamBytes = 256 << 10;
constexpr int64_t kLine = 64, kBlock = 4 * kLine;
// Ahead of the reads, in bytes; beyond a page the hardware does not look by itself.
constexpr int64_t kAhead = 2048;

#if defined(__AVX512F__)
XLLM_INLINE void stream_line(char* to, const char* from) {
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_loadu_si512(from));
}
#elif defined(__AVX__)
XLLM_INLINE void stream_line(char* to, const char* from) {
  for (int i = 0; i < 64; i += 32)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i),
                        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i)));
}
#else
XLLM_INLINE void stream_line(char* to, const char* from) { std::memcpy(to, from, kLine); }
#endif

void stream(char* to, const char* from, int64_t bytes) {
  const int64_t head = -reinterpret_cast<intptr_t>(to) & (kLine - 1);
  std::memcpy(to, from, head);
  to += head, from += head, bytes -= head;
  int64_t done = 0;
  for (; done + kBlock <= bytes; done += kBlock)
    for (int64_t i = 0; i < kBlock; i += kLine) {
      __builtin_prefetch(from + done + i + kAhead, 0, 0);
      stream_line(to + done + i, from + done + i);
    }
#if defined(__AVX__)
  // Whoever is told that the copy is done sees it.
  _mm_sfence();
#endif
  std::memcpy(to + done, from + done, bytes - done);
}

}  // namespace
}  // namespace xllm

XLLM_EXPORT void xllm_copy_bytes(void* to, const void* from, int64_t bytes) {
  if (bytes < xllm::kStreamBytes)
    std::memcpy(to, from, bytes);
  else
    xllm::stream(static_cast<char*>(to), static_cast<const char*>(from), bytes);
}
