// y[p] += B A x[p] for every row, each with factors of its own.
//
// Rows of a store lie `pitch` elements apart.

#include <algorithm>
#include <vector>

#include "rows.h"

namespace {

template <class F, class X>
void add(const F* flat, int64_t pitch, int64_t rows, const int64_t* positions, const X* x, int64_t x_pitch, int64_t n,
         X* const* y, const int64_t* y_pitch, int64_t rank, int64_t modules, int64_t A, const int64_t* B,
         const int64_t* m) {
  const Modules of{modules, A, B, m};
#pragma omp parallel
  {
    std::vector<float> room(of.room(rank)), wide_x(STREAMS * n);
#pragma omp for schedule(static)
    for (int64_t first = 0; first < rows; first += STREAMS) {
      const F* own[STREAMS];
      int64_t at[STREAMS];
      const int64_t count = std::min(STREAMS, rows - first);
      for (int64_t s = 0; s < count; ++s) {
        own[s] = flat + (first + s) * pitch;
        at[s] = positions ? positions[first + s] : first + s;
        convert(x + at[s] * x_pitch, n, wide_x.data() + s * n);
      }
      const auto to = [&](int64_t s, int64_t i) { return y[i] + at[s] * y_pitch[i]; };
      if (count == STREAMS) {
        add_updates_of_four(own, rank, of, wide_x.data(), n, to, room.data());
        continue;
      }
      for (int64_t s = 0; s < count; ++s)
        add_updates(own[s], rank, of, wide_x.data() + s * n, n, [&](int64_t i) { return to(s, i); }, room.data());
    }
  }
}

}  // namespace

extern "C" {

void add_float32(const float* flat, int64_t pitch, int64_t rows, const int64_t* positions, const float* x,
                 int64_t x_pitch, int64_t n, float* const* y, const int64_t* y_pitch, int64_t rank, int64_t modules, int64_t A,
                 const int64_t* B, const int64_t* m) {
  add(flat, pitch, rows, positions, x, x_pitch, n, y, y_pitch, rank, modules, A, B, m);
}

void add_bfloat16(const bf16* flat, int64_t pitch, int64_t rows, const int64_t* positions, const bf16* x,
                  int64_t x_pitch, int64_t n, bf16* const* y, const int64_t* y_pitch, int64_t rank, int64_t modules, int64_t A,
                  const int64_t* B, const int64_t* m) {
  add(flat, pitch, rows, positions, x, x_pitch, n, y, y_pitch, rank, modules, A, B, m);
}
}
