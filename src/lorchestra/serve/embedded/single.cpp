// One position of one sequence through all layers, in one call: its weights are read, and little else happens.
//
// Weights are [outputs, inputs] as models have them; biases may be null. What lies between two products is rounded to
// the model's dtype, as in the other passes.

#include <algorithm>
#include <numeric>
#include <vector>

#include "attention.h"
#include "layer.h"
#include "rows.h"

namespace {

// out = W x + bias, all threads of a parallel region together; x is wide (lanes.h: convert).
template <class X>
inline void multiply(const X* weight, const X* bias, const float* x, int64_t n, int64_t m, X* out) {
  const int64_t part = (m + STREAMS - 1) / STREAMS;
#pragma omp for schedule(static)
  for (int64_t i = 0; i < part; ++i) {
    const X* rows[STREAMS];
    for (int64_t s = 0; s < STREAMS; ++s) rows[s] = weight + std::min(i + s * part, m - 1) * n;
    floats16 sums[STREAMS] = {}, first, second, one, two;
    int64_t j = 0;
    for (; j + PAIR <= n; j += PAIR) {
      load_pair(x + j, &first, &second);
      for (int64_t s = 0; s < STREAMS; ++s) {
        fetch(rows[s] + j, PAIR, FAR);
        load_pair(rows[s] + j, &one, &two);
        sums[s] += one * first + two * second;
      }
    }
    for (int64_t s = 0; s < STREAMS; ++s) {
      const int64_t row = i + s * part;
      if (row >= m) break;
      float sum = total(sums[s]);
      for (int64_t k = j; k < n; ++k) sum += x[k] * wide(rows[s][k]);
      narrow(sum + (bias ? wide(bias[row]) : 0.0f), out + row);
    }
  }
}

template <class X>
struct Layer {
  const X *before, *qkv, *qkv_bias, *q_norm, *k_norm, *out, *out_bias, *after, *up, *up_bias, *down, *down_bias;
};

// The adapters of the row: null factors are none. Of each layer four groups of modules: q, k, v; out; gate, up; down.
template <class X>
struct Acting {
  const X* factors;
  int64_t rank;
  const int64_t *A, *B, *m;  // [layers * 4], [layers * 7], [7]
};

constexpr int64_t GROUPS = 4, MODULES = 7, FIRST[GROUPS] = {0, 3, 4, 6}, COUNT[GROUPS] = {3, 1, 2, 1};

template <class X>
struct Pass {
  const Layer<X>* layers;
  Heads of;
  int64_t hidden, inside;
  Acting<X> acting;

  void update(int64_t layer, int64_t group, const float* x, int64_t n, X* y, float* room) const {
    if (!acting.factors) return;
    const int64_t* m = acting.m + FIRST[group];
    const Modules modules{COUNT[group], acting.A[layer * GROUPS + group], acting.B + layer * MODULES + FIRST[group], m};
    const auto at = [&](int64_t i) { return y + std::accumulate(m, m + i, int64_t{0}); };
    add_updates(acting.factors, acting.rank, modules, x, n, at, room);
  }

  int64_t room_for_updates() const {
    if (!acting.factors) return 0;
    return Modules{MODULES, 0, nullptr, acting.m}.room(acting.rank);
  }

  // x [hidden] is changed in place; the slot of layer i begins at held + i * layer_pitch.
  void through(X* x, int64_t count, const X* cosine, const X* sine, X* held, int64_t layer_pitch, int64_t at) const {
    const int64_t width = of.width, group = of.queries / of.heads, step = 2 * of.heads * width;
    const int64_t seen_n = of.queries * width, qkv_n = seen_n + step;
    const float scale = 1.0f / std::sqrt(static_cast<float>(width));
    std::vector<X> y(hidden), qkv(qkv_n), seen(seen_n), both(2 * inside), gate(inside);
    std::vector<float> full(std::max({hidden, inside, seen_n})), changed(room_for_updates());
#pragma omp parallel
    {
      std::vector<float> room;
      for (int64_t i = 0; i < count; ++i) {
        const Layer<X>& layer = layers[i];
        X* slot = held + i * layer_pitch;
#pragma omp single
        {
          if (i) add_row(x, y.data(), hidden);
          norm_row(x, layer.before, hidden, of.epsilon, y.data());
          convert(y.data(), hidden, full.data());
        }
        multiply(layer.qkv, layer.qkv_bias, full.data(), hidden, qkv_n, qkv.data());
#pragma omp single
        {
          update(i, 0, full.data(), hidden, qkv.data(), changed.data());
          turn_row(qkv.data(), of, cosine, sine, layer.q_norm, layer.k_norm, slot + at * step);
        }
#pragma omp for schedule(static)
        for (int64_t head = 0; head < of.heads; ++head)
          attend_head<X>(qkv.data() + head * group * width, slot, at, of.heads, head, group, width, scale, 0, nullptr,
                         seen.data() + head * group * width, room);
#pragma omp single
        convert(seen.data(), seen_n, full.data());
        multiply(layer.out, layer.out_bias, full.data(), seen_n, hidden, y.data());
#pragma omp single
        {
          update(i, 1, full.data(), seen_n, y.data(), changed.data());
          add_row(x, y.data(), hidden);
          norm_row(x, layer.after, hidden, of.epsilon, y.data());
          convert(y.data(), hidden, full.data());
        }
        multiply(layer.up, layer.up_bias, full.data(), hidden, 2 * inside, both.data());
#pragma omp single
        {
          update(i, 2, full.data(), hidden, both.data(), changed.data());
          gated_row(both.data(), inside, gate.data());
          convert(gate.data(), inside, full.data());
        }
        multiply(layer.down, layer.down_bias, full.data(), inside, hidden, y.data());
#pragma omp single
        update(i, 3, full.data(), inside, y.data(), changed.data());
      }
    }
    add_row(x, y.data(), hidden);
  }
};

template <class X>
void product(const X* weight, const X* x, int64_t n, int64_t m, X* out) {
  std::vector<float> full(n);
  convert(x, n, full.data());
#pragma omp parallel
  multiply<X>(weight, nullptr, full.data(), n, m, out);
}

}  // namespace

#define FOR(X, NAME)                                                                                                   \
  void single_##NAME(X* x, const void* layers, int64_t count, int64_t queries, int64_t heads, int64_t width,           \
                     float epsilon, int64_t hidden, int64_t inside, const X* cosine, const X* sine, X* held,           \
                     int64_t layer_pitch, int64_t at, const X* factors, int64_t rank, const int64_t* A,                \
                     const int64_t* B, const int64_t* m) {                                                             \
    Pass<X>{static_cast<const Layer<X>*>(layers), Heads{queries, heads, width, epsilon}, hidden, inside,               \
            Acting<X>{factors, rank, A, B, m}}                                                                         \
        .through(x, count, cosine, sine, held, layer_pitch, at);                                                       \
  }                                                                                                                    \
  void product_##NAME(const X* weight, const X* x, int64_t n, int64_t m, X* out) { product(weight, x, n, m, out); }

extern "C" {
FOR(float, float32)
FOR(bf16, bfloat16)
}
