// y += B A x for one row or four, whose factors are read once from where they lie, as four streams side by side.
//
// A is [modules * rank, n], one module after the other; module i has B [rank, m[i]] and adds to y[i]. A rank is a multiple
// of STREAMS. Sums are float32, whatever the factors are; y is rounded once.

#pragma once

#include <algorithm>
#include <cstdint>

#include "lanes.h"

namespace {

// z[s] = A[s] x[s], of A [width, n]; x is wide (lanes.h: convert).
template <class F>
inline void project(const float* const* x, const F* const* A, int64_t n, int64_t width, float* z) {
  for (int64_t j = 0; j < width; ++j) {
    floats16 even[STREAMS] = {}, odd[STREAMS] = {}, one, two, first, second;
    int64_t k = 0;
    for (; k + PAIR <= n; k += PAIR)
      for (int s = 0; s < STREAMS; ++s) {
        const F* at = A[s] + j * n + k;
        fetch(at, PAIR, FAR);
        load_pair(at, &one, &two);
        load_pair(x[s] + k, &first, &second);
        even[s] += one * first;
        odd[s] += two * second;
      }
    for (int s = 0; s < STREAMS; ++s) {
      float sum = total(even[s] + odd[s]);
      for (int64_t i = k; i < n; ++i) sum += wide(A[s][j * n + i]) * x[s][i];
      z[s * width + j] = sum;
    }
  }
}

// y[s] += z[s] B[s], of B [rank, m]; z[s] lies at z + s * pitch, y is wide. Memory is read in its order: a sum of all
// ranks for some columns would read as many pieces at a time as there are ranks, which is half as fast.
template <class F>
inline void expand(const float* z, int64_t pitch, const F* const* B, int64_t rank, int64_t m, float* const* y) {
  for (int64_t r = 0; r < rank; ++r) {
    floats16 one, two, first, second;
    int64_t j = 0;
    for (; j + PAIR <= m; j += PAIR)
      for (int s = 0; s < STREAMS; ++s) {
        const F* at = B[s] + r * m + j;
        fetch(at, PAIR, FAR);
        load_pair(at, &one, &two);
        load_pair(y[s] + j, &first, &second);
        store_pair(first + one * z[s * pitch + r], second + two * z[s * pitch + r], y[s] + j);
      }
    for (; j < m; ++j)
      for (int s = 0; s < STREAMS; ++s) y[s][j] += wide(B[s][r * m + j]) * z[s * pitch + r];
  }
}

// What modules with the same input have: where A and each B begin in a row's factors, and what they change.
struct Modules {
  int64_t count, A;
  const int64_t *B, *m;

  int64_t widest() const { return *std::max_element(m, m + count); }
  // Numbers that `add_updates_of_four` needs room for; `add_updates` needs no more.
  int64_t room(int64_t rank) const { return STREAMS * (count * rank + widest()); }
};

// Of one row, whose factors are read as four pieces. x [n] is wide; y(i) is where module i's output is.
template <class F, class Y>
inline void add_updates(const F* own, int64_t rank, const Modules& of, const float* x, int64_t n, Y y, float* room) {
  const int64_t width = of.count * rank, part = width / STREAMS, ranks = rank / STREAMS;
  float *z = room, *sum = room + width;
  const float* from[STREAMS];
  const F* at[STREAMS];
  float* to[STREAMS];
  for (int s = 0; s < STREAMS; ++s) from[s] = x, to[s] = sum, at[s] = own + of.A + s * part * n;
  project(from, at, n, part, z);
  for (int64_t i = 0; i < of.count; ++i) {
    auto* out = y(i);
    for (int s = 0; s < STREAMS; ++s) at[s] = own + of.B[i] + s * ranks * of.m[i];
    convert(out, of.m[i], sum);
    expand(z + i * rank, ranks, at, ranks, of.m[i], to);
    convert(sum, of.m[i], out);
  }
}

// Of four rows; x [4, n] is wide, y(s, i) is where row s has module i's output.
template <class F, class Y>
inline void add_updates_of_four(const F* const* own, int64_t rank, const Modules& of, const float* x, int64_t n, Y y,
                                float* room) {
  const int64_t width = of.count * rank, widest = of.widest();
  float *z = room, *sums = room + STREAMS * width;
  const float* from[STREAMS];
  const F* at[STREAMS];
  float* to[STREAMS];
  for (int s = 0; s < STREAMS; ++s) from[s] = x + s * n, to[s] = sums + s * widest, at[s] = own[s] + of.A;
  project(from, at, n, width, z);
  for (int64_t i = 0; i < of.count; ++i) {
    for (int s = 0; s < STREAMS; ++s) at[s] = own[s] + of.B[i], convert(y(s, i), of.m[i], to[s]);
    expand(z + i * rank, width, at, rank, of.m[i], to);
    for (int s = 0; s < STREAMS; ++s) convert(to[s], of.m[i], y(s, i));
  }
}

}  // namespace
