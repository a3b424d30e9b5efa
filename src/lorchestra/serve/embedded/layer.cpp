// What a Llama layer does between its matrix products, each thing in one pass over memory.
//
// Sums and what lies between reading and writing are float32, whatever is stored; a result is rounded once.

#include <cmath>
#include <cstdint>
#include <cstring>

#include "lanes.h"

namespace {

constexpr int64_t FEW = 4;  // rows that are not worth waking other threads for

// w * x / sqrt(mean(x^2) + epsilon) (Zhang & Sennrich 2019).
template <class X>
inline void norm_row(const X* x, const X* w, int64_t n, float epsilon, X* out) {
  floats16 squares = {}, part, weight;
  float rest = 0.0f;
  int64_t j = 0;
  for (; j + LANES <= n; j += LANES) {
    load(x + j, &part);
    squares += part * part;
  }
  for (; j < n; ++j) rest += wide(x[j]) * wide(x[j]);
  const float inverse = 1.0f / std::sqrt((total(squares) + rest) / static_cast<float>(n) + epsilon);
  for (j = 0; j + LANES <= n; j += LANES) {
    load(x + j, &part);
    load(w + j, &weight);
    store(part * inverse * weight, out + j);
  }
  for (; j < n; ++j) narrow(wide(x[j]) * inverse * wide(w[j]), out + j);
}

template <class X>
inline void add_row(X* x, const X* y, int64_t n) {
  floats16 one, two;
  int64_t j = 0;
  for (; j + LANES <= n; j += LANES) {
    load(x + j, &one);
    load(y + j, &two);
    store(one + two, x + j);
  }
  for (; j < n; ++j) narrow(wide(x[j]) + wide(y[j]), x + j);
}

template <class X>
void norm(X* x, const X* y, const X* w, int64_t rows, int64_t n, float epsilon, X* out) {
#pragma omp parallel for schedule(static) if (rows > FEW)
  for (int64_t row = 0; row < rows; ++row) {
    if (y) add_row(x + row * n, y + row * n, n);
    norm_row(x + row * n, w, n, epsilon, out + row * n);
  }
}

// up * gate / (1 + e^-gate)
template <class X>
void gated(const X* both, int64_t rows, int64_t n, X* out) {
#pragma omp parallel for schedule(static) if (rows > FEW)
  for (int64_t row = 0; row < rows; ++row) {
    const X *gate = both + row * 2 * n, *up = gate + n;
    X* to = out + row * n;
    floats16 g, u;
    int64_t j = 0;
    for (; j + LANES <= n; j += LANES) {
      load(gate + j, &g);
      load(up + j, &u);
      const floats16 small = exponential(g < 0.0f ? g : -g);  // e^-|g|, which never overflows, and stops at e^-87
      const floats16 above = g < -87.0f ? floats16{} : g < 0.0f ? small : floats16{} + 1.0f;
      store(u * g * above / (small + 1.0f), to + j);
    }
    for (; j < n; ++j) {
      const float value = wide(gate[j]);
      narrow(wide(up[j]) * value / (1.0f + std::exp(-value)), to + j);
    }
  }
}

// Rotary position embedding of one head (Su et al. 2021), its halves turned against each other; `sine` holds the first
// half negative.
template <class X>
inline void turn_head(const X* from, const X* cosine, const X* sine, int64_t width, X* to) {
  const int64_t half = width / 2;
  floats16 first, second, c, s, one;
  int64_t j = 0;
  for (; j + LANES <= half; j += LANES) {
    load(from + j, &first);
    load(from + half + j, &second);
    load(cosine + j, &c);
    load(sine + j, &s);
    one = first * c + second * s;
    load(cosine + half + j, &c);
    load(sine + half + j, &s);
    store(second * c + first * s, to + half + j);
    store(one, to + j);
  }
  for (; j < half; ++j) {
    const float a = wide(from[j]), b = wide(from[half + j]);
    narrow(a * wide(cosine[j]) + b * wide(sine[j]), to + j);
    narrow(b * wide(cosine[half + j]) + a * wide(sine[half + j]), to + half + j);
  }
}

// Queries are turned where they are; keys and values go to where they are kept.
template <class X>
void turn(X* qkv, int64_t rows, int64_t queries, int64_t heads, int64_t width, const X* cosine, const X* sine,
          const int64_t* positions, const X* q_weight, const X* k_weight, float epsilon, X* held,
          const int64_t* places) {
#pragma omp parallel for schedule(static) if (rows > FEW)
  for (int64_t row = 0; row < rows; ++row) {
    X* q = qkv + row * (queries + 2 * heads) * width;
    X* k = q + queries * width;
    X* keys = held + (places ? places[row] : row) * 2 * heads * width;
    const X *c = cosine + positions[row] * width, *s = sine + positions[row] * width;
    for (int64_t i = 0; i < queries; ++i) {
      if (q_weight) norm_row(q + i * width, q_weight, width, epsilon, q + i * width);
      turn_head(q + i * width, c, s, width, q + i * width);
    }
    for (int64_t i = 0; i < heads; ++i) {
      if (k_weight) norm_row(k + i * width, k_weight, width, epsilon, k + i * width);
      turn_head(k + i * width, c, s, width, keys + i * width);
    }
    std::memcpy(keys + heads * width, k + heads * width, heads * width * sizeof(X));
  }
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
    turn(qkv, rows, queries, heads, width, cosine, sine, positions, q_weight, k_weight, epsilon, held, places);       \
  }

extern "C" {
FOR(float, float32)
FOR(bf16, bfloat16)
}
