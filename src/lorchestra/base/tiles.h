// Tiles of a processor with AMX (Intel SDM 1, chapter 18): 16 rows of 64 bytes. `TILES` says whether the compiler is told of
// them, `tiles_allowed` whether the system lets this process use them.

#pragma once

#include <cstdint>

#include "lanes.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512F__) && defined(__linux__)
#define TILES 1

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace {

constexpr int64_t SIDE = 16, DEPTH = 32, TILE = SIDE * DEPTH;  // rows, bfloat16 numbers of a row, of a tile

// All eight tiles are whole, but where less than DEPTH is multiplied at a time: then 6 is [SIDE, depth], and 7 holds its
// counterpart, of pairs.
struct alignas(64) Configuration {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
  explicit Configuration(int64_t depth = DEPTH) {
    for (int i = 0; i < 8; ++i) bytes[i] = 64, rows[i] = SIDE;
    bytes[6] = static_cast<uint16_t>(depth * 2);
    rows[7] = static_cast<uint8_t>(depth / 2);
  }
};

// GCC's own function tells it of the first eight bytes alone, so that it may leave the others unwritten.
inline void configure(const Configuration& as) {
#if defined(__clang__)
  _tile_loadconfig(&as);
#else
  asm volatile("ldtilecfg %0" : : "m"(as) : "memory");
#endif
}

// What was written is in memory before tiles are loaded from it, of which compilers are not told either.
inline void written() { asm volatile("" : : : "memory"); }

inline bool tiles_allowed() {
  constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}

}  // namespace

#else
#define TILES 0

namespace {
inline bool tiles_allowed() { return false; }
}  // namespace

#endif
