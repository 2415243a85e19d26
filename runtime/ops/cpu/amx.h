// The tile registers of AMX: permission, shapes.
//
// A tile holds up to 16 rows of 64 bytes. tdpbf16ps multiplies a tile of 16 rows x 32 bfloat16 with one of 16 units x
// 16 columns, which is how packed weights lie in memory, and adds to 16 x 16 float32. Each row of the result depends
// on its own row only, so rows give the same bits alone or in a batch.
#pragma once

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512BF16__)
#define XLLM_AMX 1

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>

#include "shim_util.h"

namespace xllm {

constexpr int kTileSide = 16;
// Reduction axis of one tile, in units of two bfloat16.
constexpr int64_t kTileUnits = 16;

// The kernel gives a process the tile registers on request only (arch_prctl(2), ARCH_REQ_XCOMP_PERM).
inline void require_tiles() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  static const long status = syscall(SYS_arch_prctl, kRequestPermission, kTileData);
  check(status == 0, "the operating system refuses this process the AMX tiles the kernels were built for; recompile "
                     "the model with AMX hidden from it");
}

// Shapes for `upper` rows in tiles 0, 1 and 4, `lower` rows in tiles 2, 3 and 5; 6 and 7 are the weights.
XLLM_INLINE void configure_tiles(int upper, int lower) {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {};
  } config;
  for (const int tile : {0, 1, 4}) config.rows[tile] = uint8_t(upper);
  for (const int tile : {2, 3, 5}) config.rows[tile] = uint8_t(lower > 0 ? lower : 1);
  config.rows[6] = config.rows[7] = kTileSide;
  _tile_loadconfig(&config);
}

}  // namespace xllm
#endif
