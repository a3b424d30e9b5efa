// y = x W' + bias for a few rows of bfloat16 by AMX tiles: weights are read once, in the order of memory.
//
// W [m, n] lies as tiles [m / 16][n / 32][16 pairs of inputs][16 outputs][2]; the rows that
// fill no tile are copied to one. Sums are float32, bias is added to them, and y is rounded once.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "tiles.h"

#if TILES

namespace {

constexpr int64_t PANEL = 96;                   // outputs for which x stays in the nearest cache
constexpr int64_t FETCHED = 2048;  // bytes ahead

// Tiles of rows, `upper` and if it is not null `lower`, by two of outputs, whose weights are `first` and `second`.
template <bool BOTH>
inline void multiply(const bf16* upper, const bf16* lower, int64_t n, const bf16* first, const bf16* second, bool fetches, float* out) {
  _tile_zero(0);
  _tile_zero(1);
  if (BOTH) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < n; k += DEPTH, first += TILE, second += TILE) {
    if (fetches) {
      fetch(first, TILE, FETCHED);
      fetch(second, TILE, FETCHED);
    }
    _tile_loadd(4, first, 64);
    _tile_loadd(5, second, 64);
    _tile_loadd(6, upper + k, n * sizeof(bf16));
    _tile_dpbf16ps(0, 6, 4);
    _tile_dpbf16ps(1, 6, 5);
    if (BOTH) {
      _tile_loadd(7, lower + k, n * sizeof(bf16));
      _tile_dpbf16ps(2, 7, 4);
      _tile_dpbf16ps(3, 7, 5);
    }
  }
  constexpr int64_t PITCH = 2 * SIDE * sizeof(float);
  _tile_stored(0, out, PITCH);
  _tile_stored(1, out + SIDE, PITCH);
  if (BOTH) {
    _tile_stored(2, out + 2 * SIDE * SIDE, PITCH);
    _tile_stored(3, out + 2 * SIDE * SIDE + SIDE, PITCH);
  }
}

// Rows of sums, 2 * SIDE each, to y.
inline void keep(const float* sums, int64_t rows, const bf16* bias, bf16* y, int64_t m) {
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t j = 0; j < 2 * SIDE; j += SIDE) {
      floats16 value, more = {};
      load(sums + row * 2 * SIDE + j, &value);
      if (bias) load(bias + j, &more);
      store(value + more, y + row * m + j);
    }
}

}  // namespace

#endif

extern "C" {

int tiles_usable() { return TILES && tiles_allowed(); }

// x [rows, n] and y [rows, m] are whole; n a multiple of DEPTH, m of 2 * SIDE; bias may be null.
void tiles_multiply(const bf16* x, int64_t rows, const bf16* weight, const bf16* bias, int64_t n, int64_t m, bf16* y) {
#if TILES
  const int64_t whole = rows / SIDE * SIDE, panels = (m + PANEL - 1) / PANEL;
  static thread_local std::vector<bf16> room;
  room.resize(SIDE * n);
  std::memcpy(room.data(), x + whole * n, (rows - whole) * n * sizeof(bf16));  // what is left there of others is not kept
  written();
  const bf16* rest = room.data();
  const auto tile = [&](int64_t row) { return row < whole ? x + row * n : rest; };
#pragma omp parallel
  {
    const Configuration configuration;
    configure(configuration);
    alignas(64) float sums[4 * SIDE * SIDE];
#pragma omp for schedule(static)
    for (int64_t panel = 0; panel < panels; ++panel)
      for (int64_t from = 0; from < rows; from += 2 * SIDE)
        for (int64_t o = panel * PANEL; o < std::min(m, (panel + 1) * PANEL); o += 2 * SIDE) {
          const bf16 *first = weight + o * n, *second = first + SIDE * n;
          if (from + SIDE < rows)
            multiply<true>(tile(from), tile(from + SIDE), n, first, second, from == 0, sums);
          else
            multiply<false>(tile(from), nullptr, n, first, second, from == 0, sums);
          keep(sums, std::min(2 * SIDE, rows - from), bias ? bias + o : nullptr, y + from * m + o, m);
        }
    _tile_release();
  }
#else
  (void)x, (void)rows, (void)weight, (void)bias, (void)n, (void)m, (void)y;
#endif
}
}
