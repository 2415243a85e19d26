// The last error of the calling thread.
#include "shim_util.h"

namespace {
thread_local std::string last_error;
}

namespace xllm {

void set_last_error(const char* op, const char* text) {
  last_error = std::string("xllm::") + op + ": " + text;
  std::fprintf(stderr, "%s\n", last_error.c_str());
}

}  // namespace xllm

XLLM_EXPORT const char* xllm_last_error() { return last_error.c_str(); }
