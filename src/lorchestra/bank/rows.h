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

// z = x A, where A has 8 V columns; two sums take turns, so that none waits for the one before.
template <int V, class F, class X>
inline void project(const X* x, const F* A, int64_t n, float* z) {
  floats8 even[V] = {}, odd[V] = {}, first, second;
  int64_t k = 0;
  for (; k + 1 < n; k += 2) {
    const float one = wide(x[k]), two = wide(x[k + 1]);
    const F* at = A + k * 8 * V;
    fetch(at, 16 * V, AHEAD);
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

// z[s] = x[s] A[s] of four rows, where A has 8 V columns.
template <int V, class F, class X>
inline void project_four(const X* const* x, const F* const* A, int64_t n, int64_t width, float* z) {
  floats8 sum[STREAMS][V] = {}, part;
  int64_t k = 0;
  for (; k + 4 <= n; k += 4)  // a few lines of one row at a time: its pieces are fetched whole
    for (int s = 0; s < STREAMS; ++s) {
      const F* at = A[s] + k * 8 * V;
      fetch(at, 32 * V, FAR);
      for (int j = 0; j < 4; ++j)
        for (int i = 0; i < V; ++i) {
          load(at + 8 * (j * V + i), &part);
          sum[s][i] += part * wide(x[s][k + j]);
        }
    }
  for (; k < n; ++k)
    for (int s = 0; s < STREAMS; ++s)
      for (int i = 0; i < V; ++i) {
        load(A[s] + 8 * (k * V + i), &part);
        sum[s][i] += part * wide(x[s][k]);
      }
  for (int s = 0; s < STREAMS; ++s) std::memcpy(z + s * width, sum[s], sizeof sum[s]);
}

// y[s] += z[s] B[s] of four rows.
template <class F, class X>
inline void expand_four(const float* z, int64_t width, const F* const* B, int64_t rank, int64_t m, X* const* y) {
  int64_t from = 0;
  for (; from + 32 <= m; from += 32) {
    floats16 sum[STREAMS][2] = {}, part;
    for (int64_t r = 0; r < rank; ++r)
      for (int s = 0; s < STREAMS; ++s) {
        const F* at = B[s] + r * m + from;
        fetch(at, 32, FAR);
        for (int i = 0; i < 2; ++i) {
          load(at + 16 * i, &part);
          sum[s][i] += part * z[s * width + r];
        }
      }
    for (int s = 0; s < STREAMS; ++s)
      for (int i = 0; i < 2; ++i) {
        load(y[s] + from + 16 * i, &part);
        store(part + sum[s][i], y[s] + from + 16 * i);
      }
  }
  for (; from < m; ++from)
    for (int s = 0; s < STREAMS; ++s) {
      float sum = wide(y[s][from]);
      for (int64_t r = 0; r < rank; ++r) sum += z[s * width + r] * wide(B[s][r * m + from]);
      narrow(sum, y[s] + from);
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

// The same for four rows; false, and nothing is done, for a width that has no code of its own. y(s, i) is where row s
// has module i's output; z has room for 4 * count * rank.
template <class F, class X, class Y>
inline bool add_updates_of_four(const F* const* own, int64_t rank, const Modules& of, const X* const* x, int64_t n, Y y,
                                float* z) {
  const int64_t width = of.count * rank;
  const F* at[STREAMS];
  for (int s = 0; s < STREAMS; ++s) at[s] = own[s] + of.A;
  switch (width) {
    case 8: project_four<1>(x, at, n, width, z); break;
    case 16: project_four<2>(x, at, n, width, z); break;
    case 24: project_four<3>(x, at, n, width, z); break;
    case 32: project_four<4>(x, at, n, width, z); break;
    case 48: project_four<6>(x, at, n, width, z); break;
    default: return false;
  }
  for (int64_t i = 0; i < of.count; ++i) {
    X* to[STREAMS];
    for (int s = 0; s < STREAMS; ++s) at[s] = own[s] + of.B[i], to[s] = y(s, i);
    expand_four(z + i * rank, width, at, rank, of.m[i], to);
  }
  return true;
}

}  // namespace
