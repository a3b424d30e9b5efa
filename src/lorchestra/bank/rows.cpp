// y[p] += (x[p] A) B for every row, each with factors of its own.
//
// Rows of a store lie `pitch` elements apart.

#include <vector>

#include "rows.h"

namespace {

template <class F, class X>
void add(const F* flat, int64_t pitch, int64_t rows, const int64_t* positions, const X* x, int64_t x_pitch, int64_t n,
         X* const* y, const int64_t* y_pitch, int64_t rank, int64_t modules, int64_t A, const int64_t* B,
         const int64_t* m) {
#pragma omp parallel
  {
    std::vector<float> z(modules * rank);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t position = positions ? positions[row] : row;
      add_updates(flat + row * pitch, rank, Modules{modules, A, B, m}, x + position * x_pitch, n,
                  [&](int64_t i) { return y[i] + position * y_pitch[i]; }, z.data());
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
