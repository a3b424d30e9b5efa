// y += (x A) B for one row, whose factors are read once from where they lie.
//
// A is [n, width], width = modules * rank; module i has B [rank, m[i]] and adds to y[i]. Sums are float32, whatever the
// factors are.

#pragma once

#include <cstdint>
#include <cstring>

#include "lanes.h"

namespace {

constexpr int64_t AHEAD = 512;  // bytes: pieces are short, and a processor's own foresight begins late

// What lies ahead of `count` numbers.
template <class F>
inline void fetch(const F* from, int64_t count) {
  for (int64_t byte = 0; byte < static_cast<int64_t>(count * sizeof(F)); byte += 64)
    __builtin_prefetch(reinterpret_cast<const char*>(from) + AHEAD + byte);
}

// z = x A, where A has 8 V columns; two sums take turns, so that none waits for the one before.
template <int V, class F, class X>
inline void project(const X* x, const F* A, int64_t n, float* z) {
  floats8 even[V] = {}, odd[V] = {}, first, second;
  int64_t k = 0;
  for (; k + 1 < n; k += 2) {
    const float one = wide(x[k]), two = wide(x[k + 1]);
    const F* at = A + k * 8 * V;
    fetch(at, 16 * V);
    for (int i = 0; i < V; ++i) {
      load(at + 8 * i, &first);
      load(at + 8 * (V + i), &second);
      even[i] += first * one;
      odd[i] += second * two;
    }
  }
  if (k < n)
    for (int i = 0; i < V; ++i) {
      load(A + 8 * (k * V + i), &first);
      even[i] += first * wide(x[k]);
    }
  for (int i = 0; i < V; ++i) even[i] += odd[i];
  std::memcpy(z, even, sizeof even);
}

template <class F, class X>
inline void project(const X* x, const F* A, int64_t n, int64_t width, float* z) {
  for (int64_t j = 0; j < width; ++j) z[j] = 0.0f;
  for (int64_t k = 0; k < n; ++k)
    for (int64_t j = 0; j < width; ++j) z[j] += wide(x[k]) * wide(A[k * width + j]);
}

// y += z B
template <class F, class X>
inline void expand(const float* z, const F* B, int64_t rank, int64_t m, X* y) {
  int64_t from = 0;
  for (; from + 64 <= m; from += 64) {
    floats16 sum[4] = {}, part;
    for (int64_t r = 0; r < rank; ++r)
      for (int i = 0; i < 4; ++i) {
        load(B + r * m + from + 16 * i, &part);
        sum[i] += part * z[r];
      }
    for (int i = 0; i < 4; ++i) {
      load(y + from + 16 * i, &part);
      store(part + sum[i], y + from + 16 * i);
    }
  }
  for (; from < m; ++from) {
    float sum = 0.0f;
    for (int64_t r = 0; r < rank; ++r) sum += z[r] * wide(B[r * m + from]);
    narrow(wide(y[from]) + sum, &y[from]);
  }
}

// What modules with the same input have: where A and each B begin in a row's factors, and what they change.
struct Modules {
  int64_t count, A;
  const int64_t *B, *m;
};

// y(i) is where module i's output is; z has room for count * rank.
template <class F, class X, class Y>
inline void add_updates(const F* own, int64_t rank, const Modules& of, const X* x, int64_t n, Y y, float* z) {
  const int64_t width = of.count * rank;
  switch (width) {
    case 8: project<1>(x, own + of.A, n, z); break;
    case 16: project<2>(x, own + of.A, n, z); break;
    case 24: project<3>(x, own + of.A, n, z); break;
    case 32: project<4>(x, own + of.A, n, z); break;
    case 48: project<6>(x, own + of.A, n, z); break;
    default: project(x, own + of.A, n, width, z);
  }
  for (int64_t i = 0; i < of.count; ++i) expand(z + i * rank, own + of.B[i], rank, of.m[i], y(i));
}

}  // namespace
