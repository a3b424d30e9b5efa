// The pieces of layer.h for all positions of a batch.

#include "layer.h"

namespace {

constexpr int64_t FEW = 4;  // rows that are not worth waking other threads for

template <class X>
void norm(X* x, const X* y, const X* w, int64_t rows, int64_t n, float epsilon, X* out) {
#pragma omp parallel for schedule(static) if (rows > FEW)
  for (int64_t row = 0; row < rows; ++row) {
    if (y) add_row(x + row * n, y + row * n, n);
    norm_row(x + row * n, w, n, epsilon, out + row * n);
  }
}

template <class X>
void gated(const X* both, int64_t rows, int64_t n, X* out) {
#pragma omp parallel for schedule(static) if (rows > FEW)
  for (int64_t row = 0; row < rows; ++row) gated_row(both + row * 2 * n, n, out + row * n);
}

template <class X>
void turn(X* qkv, int64_t rows, const Heads& of, const X* cosine, const X* sine, const int64_t* positions,
          const X* q_weight, const X* k_weight, X* held, const int64_t* places) {
#pragma omp parallel for schedule(static) if (rows > FEW)
  for (int64_t row = 0; row < rows; ++row)
    turn_row(qkv + row * (of.queries + 2 * of.heads) * of.width, of, cosine + positions[row] * of.width,
             sine + positions[row] * of.width, q_weight, k_weight,
             held + (places ? places[row] : row) * 2 * of.heads * of.width);
}

}  // namespace

#define FOR(X, NAME)                                                                                                  \
  void norm_##NAME(X* x, const X* y, const X* w, int64_t rows, int64_t n, float epsilon, X* out) {                    \
    norm(x, y, w, rows, n, epsilon, out);                                                                             \
  }                                                                                                                   \
  void gated_##NAME(const X* both, int64_t rows, int64_t n, X* out) { gated(both, rows, n, out); }                    \
  void turn_##NAME(X* qkv, int64_t rows, int64_t queries, int64_t heads, int64_t width, const X* cosine,              \
                   const X* sine, const int64_t* positions, const X* q_weight, const X* k_weight, float epsilon,      \
                   X* held, const int64_t* places) {                                                                  \
    turn(qkv, rows, Heads{queries, heads, width, epsilon}, cosine, sine, positions, q_weight, k_weight, held, places); \
  }

extern "C" {
FOR(float, float32)
FOR(bf16, bfloat16)
}
