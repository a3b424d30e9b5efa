// One query position attends to the keys and values of a slot, read once and only as far as they go.
//
// A slot is [positions, 2, heads, width]: of a position its keys, then its values. Scores, weights and sums are float32,
// whatever is stored.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "lanes.h"

namespace {

constexpr int64_t FORESEEN = 8;  // positions: a slot is read with gaps, which processors do not foresee

// Fetch a piece of what is read next: of the slot after this one, in its order, or, where there is none, of this one.
template <class X>
inline void foresee(const X* after, int64_t t, const X* here, int64_t step, int64_t width) {
  fetch(after ? after + t * width : here + FORESEEN * step, width, 0);
}

// Scores of G queries, V lanes wide each, with the keys of `count` positions that lie `step` apart.
template <int G, int V, class X>
void score(const X* q, const X* keys, int64_t step, int64_t count, float scale, float* scores, int64_t pitch,
           const X* after) {
  floats16 query[G][V], part;
  for (int i = 0; i < G; ++i)
    for (int j = 0; j < V; ++j) {
      load(q + LANES * (i * V + j), &query[i][j]);
      query[i][j] *= scale;
    }
  for (int64_t t = 0; t < count; ++t) {
    const X* key = keys + t * step;
    foresee(after, t, key, step, V * LANES);
    floats16 sum[G] = {};
    for (int j = 0; j < V; ++j) {
      load(key + LANES * j, &part);
      for (int i = 0; i < G; ++i) sum[i] += part * query[i][j];
    }
    for (int i = 0; i < G; ++i) scores[i * pitch + t] = total(sum[i]);
  }
}

// Sums of the values of `count` positions by G rows of weights.
template <int G, int V, class X>
void collect(const X* values, int64_t step, int64_t count, const float* weights, int64_t pitch, X* out,
             const X* after) {
  floats16 sum[G][V] = {}, part;
  for (int64_t t = 0; t < count; ++t) {
    const X* value = values + t * step;
    foresee(after, t, value, step, V * LANES);
    for (int j = 0; j < V; ++j) {
      load(value + LANES * j, &part);
      for (int i = 0; i < G; ++i) sum[i][j] += part * weights[i * pitch + t];
    }
  }
  for (int i = 0; i < G; ++i)
    for (int j = 0; j < V; ++j) store(sum[i][j], out + LANES * (i * V + j));
}

// Scores to weights, in place; there is room for whole lanes.
inline void softmax(float* scores, int64_t count) {
  const int64_t padded = (count + LANES - 1) / LANES * LANES;
  const float largest = *std::max_element(scores, scores + count);
  for (int64_t t = count; t < padded; ++t) scores[t] = largest - 100.0f;  // e^-87 of the sum: nothing
  floats16 sum = {}, value;
  for (int64_t t = 0; t < padded; t += LANES) {
    std::memcpy(&value, scores + t, sizeof value);
    value = exponential(value - largest);
    std::memcpy(scores + t, &value, sizeof value);
    sum += value;
  }
  const float inverse = 1.0f / total(sum);  // a score that is no number makes the answer none, as it should
  for (int64_t t = 0; t < count; ++t) scores[t] *= inverse;
}

template <int G, int V, class X>
void attend_queries(const X* q, const X* keys, const X* values, int64_t step, int64_t count, float scale, X* out,
                    const X* after, std::vector<float>& room) {
  const int64_t pitch = (count + LANES - 1) / LANES * LANES;
  room.resize(G * pitch);
  score<G, V>(q, keys, step, count, scale, room.data(), pitch, after);
  for (int i = 0; i < G; ++i) softmax(room.data() + i * pitch, count);
  collect<G, V>(values, step, count, room.data(), pitch, out, after ? after + count * V * LANES : nullptr);
}

// All queries of a group, as many at a time as registers hold.
template <int V, class X>
void attend_group(const X* q, const X* keys, const X* values, int64_t step, int64_t count, int64_t group, float scale,
                  X* out, const X* after, std::vector<float>& room) {
  constexpr int MOST = V <= 4 ? 4 : V <= 8 ? 2 : 1;
  const int64_t width = V * LANES;
  while (group > 0) {
    int64_t taken = std::min<int64_t>(group, MOST);
    switch (taken) {
      case 4: attend_queries<MOST, V>(q, keys, values, step, count, scale, out, after, room); break;
      case 3: attend_queries<(MOST < 3 ? MOST : 3), V>(q, keys, values, step, count, scale, out, after, room); break;
      case 2: attend_queries<(MOST < 2 ? MOST : 2), V>(q, keys, values, step, count, scale, out, after, room); break;
      default: attend_queries<1, V>(q, keys, values, step, count, scale, out, after, room);
    }
    q += taken * width;
    out += taken * width;
    group -= taken;
  }
}

// Queries [group, width] of key-value head `head` to positions up to `at`, of the last `window` if that is not 0. The heads
// of a slot, one after the other, fetch as much of the slot at `next`, if it is not null, as they read of their own.
template <class X>
inline void attend_head(const X* queries, const X* slot, int64_t at, int64_t heads, int64_t head, int64_t group,
                        int64_t width, float scale, int64_t window, const X* next, X* to, std::vector<float>& room) {
  const int64_t step = 2 * heads * width, end = at + 1, from = window > 0 ? std::max<int64_t>(0, end - window) : 0;
  const X* keys = slot + from * step + head * width;
  const X* values = keys + heads * width;
  const int64_t count = end - from;
  const X* after = next ? next + from * step + 2 * head * count * width : nullptr;
  switch (width) {
    case 16: attend_group<1>(queries, keys, values, step, count, group, scale, to, after, room); break;
    case 32: attend_group<2>(queries, keys, values, step, count, group, scale, to, after, room); break;
    case 64: attend_group<4>(queries, keys, values, step, count, group, scale, to, after, room); break;
    case 80: attend_group<5>(queries, keys, values, step, count, group, scale, to, after, room); break;
    case 96: attend_group<6>(queries, keys, values, step, count, group, scale, to, after, room); break;
    case 128: attend_group<8>(queries, keys, values, step, count, group, scale, to, after, room); break;
    case 256: attend_group<16>(queries, keys, values, step, count, group, scale, to, after, room); break;
  }
}

}  // namespace
