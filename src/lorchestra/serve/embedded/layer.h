// What a Llama layer does between its matrix products, for one position: each thing in one pass over memory.
//
// Sums and what lies between reading and writing are float32, whatever is stored; a result is rounded once.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "lanes.h"

namespace {

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

// up * gate / (1 + e^-gate), of n gates and then n ups.
template <class X>
inline void gated_row(const X* gate, int64_t n, X* to) {
  const X* up = gate + n;
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

// Of a model's attention.
struct Heads {
  int64_t queries, heads, width;
  float epsilon;
};

// Queries are turned where they are; keys and values go to `keys`, a position of a slot.
template <class X>
inline void turn_row(X* q, const Heads& of, const X* cosine, const X* sine, const X* q_weight, const X* k_weight,
                     X* keys) {
  const int64_t width = of.width;
  X* k = q + of.queries * width;
  for (int64_t i = 0; i < of.queries; ++i) {
    if (q_weight) norm_row(q + i * width, q_weight, width, of.epsilon, q + i * width);
    turn_head(q + i * width, cosine, sine, width, q + i * width);
  }
  for (int64_t i = 0; i < of.heads; ++i) {
    if (k_weight) norm_row(k + i * width, k_weight, width, of.epsilon, k + i * width);
    turn_head(k + i * width, cosine, sine, width, keys + i * width);
  }
  std::memcpy(keys + of.heads * width, k + of.heads * width, of.heads * width * sizeof(X));
}

}  // namespace
