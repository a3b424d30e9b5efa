// y[p] += x[p] A' B for prompts p, each with factors of its own and many positions, by AMX tiles, in bfloat16. z = x A' is
// rounded to it, sums are float32, y is rounded once.
//
// Of a row, A is [modules * rank, n] and module i has B [rank, m[i]]; a rank is a power of two from 8 up, n and m are
// multiples of DEPTH.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "tiles.h"

#if TILES

namespace {

constexpr int64_t SPAN = 256;  // positions of a prompt that one thread takes

// 16 x 16 words from rows `pitch` words apart, transposed: rows become columns.
inline void transpose(const uint32_t* from, int64_t pitch, int64_t rows, uint32_t* to) {
  __m512i r[16], t[16];
  for (int i = 0; i < 16; ++i) r[i] = i < rows ? _mm512_loadu_si512(from + i * pitch) : _mm512_setzero_si512();
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {  // the quarters of r[i], r[4 + i], r[8 + i], r[12 + i] are columns i, 4 + i, 8 + i, 12 + i
    const __m512i a = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88), b = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
    const __m512i c = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88), d = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
    _mm512_storeu_si512(to + 16 * i, _mm512_shuffle_i32x4(a, c, 0x88));
    _mm512_storeu_si512(to + 16 * (4 + i), _mm512_shuffle_i32x4(b, d, 0x88));
    _mm512_storeu_si512(to + 16 * (8 + i), _mm512_shuffle_i32x4(a, c, 0xdd));
    _mm512_storeu_si512(to + 16 * (12 + i), _mm512_shuffle_i32x4(b, d, 0xdd));
  }
}

// A prompt's positions, in tiles of rows; the last ones are copied where they fill none.
struct Positions {
  const bf16* x;
  int64_t pitch, count, n;
  std::vector<bf16> rest;

  Positions(const bf16* x, int64_t pitch, int64_t count, int64_t n) : x(x), pitch(pitch), count(count), n(n) {
    const int64_t whole = count / SIDE * SIDE;
    if (whole == count) return;
    rest.resize(SIDE * n);
    for (int64_t row = whole; row < count; ++row)
      std::memcpy(rest.data() + (row - whole) * n, x + row * pitch, n * sizeof(bf16));
  }
  const bf16* tile(int64_t row) const { return row + SIDE <= count ? x + row * pitch : rest.data(); }
  int64_t bytes(int64_t row) const { return (row + SIDE <= count ? pitch : n) * static_cast<int64_t>(sizeof(bf16)); }
};

// z [positions, width] = x A'.
inline void project(const Positions& of, const bf16* A, int64_t width, bf16* z) {
  const int64_t columns = (width + SIDE - 1) / SIDE, steps = of.n / DEPTH;
  std::vector<bf16> packed(columns * steps * TILE);
  for (int64_t c = 0; c < columns; ++c)
    for (int64_t k = 0; k < steps; ++k)
      transpose(reinterpret_cast<const uint32_t*>(A + c * SIDE * of.n + k * DEPTH), of.n / 2,
                std::min(SIDE, width - c * SIDE), reinterpret_cast<uint32_t*>(packed.data() + (c * steps + k) * TILE));
  written();
  alignas(64) float sums[SIDE * SIDE];
  const auto keep = [&](int64_t row, int64_t c) {
    for (int64_t i = 0; i < SIDE; ++i)
      for (int64_t j = c * SIDE; j < std::min(width, (c + 1) * SIDE); ++j)
        narrow(sums[i * SIDE + j - c * SIDE], z + (row + i) * width + j);
  };
  // Two tiles of rows at a time, whose sums take turns: one waits for its last product.
  for (int64_t row = 0; row < of.count; row += 2 * SIDE)
    for (int64_t c = 0; c < columns; ++c) {
      const int64_t below = row + SIDE < of.count ? row + SIDE : row;
      const bf16 *upper = of.tile(row), *lower = of.tile(below), *weight = packed.data() + c * steps * TILE;
      _tile_zero(0);
      _tile_zero(1);
      for (int64_t k = 0; k < steps; ++k, weight += TILE) {
        _tile_loadd(5, weight, 64);
        _tile_loadd(4, upper + k * DEPTH, of.bytes(row));
        _tile_dpbf16ps(0, 4, 5);
        _tile_loadd(3, lower + k * DEPTH, of.bytes(below));
        _tile_dpbf16ps(1, 3, 5);
      }
      _tile_stored(0, sums, SIDE * sizeof(float));
      keep(row, c);
      if (below == row) continue;
      _tile_stored(1, sums, SIDE * sizeof(float));
      keep(below, c);
    }
}

// y [positions, m] += z B; z has `width` numbers a row.
inline void expand(const bf16* z, int64_t width, const bf16* B, int64_t rank, int64_t m, int64_t count, bf16* y,
                   int64_t y_pitch) {
  const int64_t depth = std::min(rank, DEPTH), halves = rank / 2;
  std::vector<uint32_t> packed(2 * halves * SIDE);
  uint32_t *even = packed.data(), *odd = even + halves * SIDE;
  alignas(64) float sums[2][SIDE * SIDE];
  for (int64_t o = 0; o < m; o += PAIR) {
    // Pairs of ranks, first of the even outputs and then of the odd ones: as `load_pair` has them.
    for (int64_t p = 0; p < halves; ++p) {
      words16 one, two;
      std::memcpy(&one, B + 2 * p * m + o, sizeof one);
      std::memcpy(&two, B + (2 * p + 1) * m + o, sizeof two);
      const words16 low = (one & 0xffffu) | (two << 16), high = (one >> 16) | (two & 0xffff0000u);
      std::memcpy(even + p * SIDE, &low, sizeof low);
      std::memcpy(odd + p * SIDE, &high, sizeof high);
    }
    written();
    for (int64_t row = 0; row < count; row += SIDE) {
      _tile_zero(0);
      _tile_zero(1);
      for (int64_t k = 0; k < rank; k += depth) {
        _tile_loadd(6, z + row * width + k, width * sizeof(bf16));
        _tile_loadd(7, even + k / 2 * SIDE, 64);
        _tile_dpbf16ps(0, 6, 7);
        _tile_loadd(7, odd + k / 2 * SIDE, 64);
        _tile_dpbf16ps(1, 6, 7);
      }
      _tile_stored(0, sums[0], SIDE * sizeof(float));
      _tile_stored(1, sums[1], SIDE * sizeof(float));
      for (int64_t i = 0; i < std::min(SIDE, count - row); ++i) {
        bf16* at = y + (row + i) * y_pitch + o;
        floats16 one, two, first, second;
        load_pair(at, &one, &two);
        load(sums[0] + i * SIDE, &first);
        load(sums[1] + i * SIDE, &second);
        store_pair(one + first, two + second, at);
      }
    }
  }
}

}  // namespace

#endif

extern "C" {

int prompts_by_tiles() { return TILES && tiles_allowed(); }

// Row i of `rows` has its factors at flat[i] and is the batch's positions[i]; x and y lie by batch and position as their
// steps say.
void add_prompts(const bf16* const* flat, int64_t rows, const int64_t* positions, const bf16* x, int64_t x_row,
                 int64_t x_pitch, int64_t count, int64_t n, bf16* const* y, const int64_t* y_row, const int64_t* y_pitch,
                 int64_t rank, int64_t modules, int64_t A, const int64_t* B, const int64_t* m) {
#if TILES
  const int64_t width = modules * rank;
#pragma omp parallel
  {
    const Configuration configuration(std::min(rank, DEPTH));
    configure(configuration);
    std::vector<bf16> z((std::min(count, SPAN) + SIDE - 1) / SIDE * SIDE * width);
#pragma omp for schedule(dynamic) collapse(2)
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t from = 0; from < count; from += SPAN) {
        const int64_t some = std::min(SPAN, count - from);
        project(Positions(x + positions[i] * x_row + from * x_pitch, x_pitch, some, n), flat[i] + A, width, z.data());
        for (int64_t j = 0; j < modules; ++j)
          expand(z.data() + j * rank, width, flat[i] + B[j], rank, m[j], some,
                 y[j] + positions[i] * y_row[j] + from * y_pitch[j], y_pitch[j]);
      }
    _tile_release();
  }
#else
  (void)flat, (void)rows, (void)positions, (void)x, (void)x_row, (void)x_pitch, (void)count, (void)n, (void)y;
  (void)y_row, (void)y_pitch, (void)rank, (void)modules, (void)A, (void)B, (void)m;
#endif
}
}
