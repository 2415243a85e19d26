// The layout of packed weights: [block][unit][32 columns], see the package docstring.
#pragma once

#include "shim_util.h"
#include "tile.h"

namespace xllm {

constexpr int64_t kBlockColumns = 32;
// A step of the packed and of the quantised layouts is 4 bytes for each of the 32 columns of a block: two cache lines.
constexpr int64_t kStepBytes = 4 * kBlockColumns;

// Contiguous inside a block; the blocks may lie any distance apart.
inline void expect_contiguous_blocks(const View& weight) {
  int64_t step = 1;
  for (int64_t axis = weight.dim - 1; axis > 0; step *= weight.sizes[axis--])
    check(weight.strides[axis] == step || weight.sizes[axis] == 1, "%s.stride(%lld) is %lld, expected %lld",
          weight.name, (long long)axis, (long long)weight.strides[axis], (long long)step);
}

template <class T>
void check_packed(const View& weight, int64_t in_features) {
  weight.expect_dim(kPair<T> == 2 ? 4 : 3);
  weight.expect_size(1, units_of<T>(in_features)).expect_size(2, kBlockColumns);
  if (kPair<T> == 2) weight.expect_size(3, 2);
  expect_contiguous_blocks(weight);
}

}  // namespace xllm
