// The way a product takes on this CPU.
#pragma once

#include "gemm_amx.h"
#include "gemm_tile.h"

namespace xllm {

// x [rows, C] times `weight`. T is the type of x.
template <class T, class Weight>
void linear(const View& x, const Product& job, const Weight& weight) {
  if (job.rows == 0) return;
#if defined(XLLM_AMX)
  if constexpr (kPair<T> == 2) {
    linear_tiles(x, job, weight);
    return;
  }
#endif
  linear_registers<T>(x, job, weight);
}

}  // namespace xllm
