// One position of one sequence through all layers, in one call: its weights are read, and little else happens.
//
// Weights are [outputs, inputs] as models have them; biases may be null. What lies between two products is rounded to
// the model's dtype, as in the other passes.

#include <numeric>
#include <vector>

#include "attention.h"
#include "layer.h"
#include "rows.h"

namespace {

// out = W x + bias, all threads of a parallel region together; x is wide already.
template <class X>
inline void multiply(const X* weight, const X* bias, const float* x, int64_t n, int64_t m, X* out) {
#pragma omp for schedule(static)
  for (int64_t i = 0; i < m; i += 2) {
    const X *one = weight + i * n, *two = i + 1 < m ? one + n : one;
    floats16 sums[4] = {}, a, b, c, d;
    int64_t j = 0;
    for (; j + 2 * LANES <= n; j += 2 * LANES) {
      load(x + j, &a);
      load(x + j + LANES, &b);
      load(one + j, &c);
      load(one + j + LANES, &d);
      sums[0] += a * c;
      sums[1] += b * d;
      load(two + j, &c);
      load(two + j + LANES, &d);
      sums[2] += a * c;
      sums[3] += b * d;
    }
    float first = total(sums[0] + sums[1]), second = total(sums[2] + sums[3]);
    for (; j < n; ++j) {
      first += x[j] * wide(one[j]);
      second += x[j] * wide(two[j]);
    }
    narrow(first + (bias ? wide(bias[i]) : 0.0f), out + i);
    if (i + 1 < m) narrow(second + (bias ? wide(bias[i + 1]) : 0.0f), out + i + 1);
  }
}

template <class X>
inline void widen(const X* x, int64_t n, float* out) {
  for (int64_t j = 0; j < n; ++j) out[j] = wide(x[j]);
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

  void update(int64_t layer, int64_t group, const X* x, int64_t n, X* y, float* z) const {
    if (!acting.factors) return;
    const int64_t* m = acting.m + FIRST[group];
    const Modules modules{COUNT[group], acting.A[layer * GROUPS + group], acting.B + layer * MODULES + FIRST[group], m};
    const auto at = [&](int64_t i) { return y + std::accumulate(m, m + i, int64_t{0}); };
    add_updates(acting.factors, acting.rank, modules, x, n, at, z);
  }

  // x [hidden] is changed in place; the slot of layer i begins at held + i * layer_pitch.
  void through(X* x, int64_t count, const X* cosine, const X* sine, X* held, int64_t layer_pitch, int64_t at) const {
    const int64_t width = of.width, group = of.queries / of.heads, step = 2 * of.heads * width;
    const int64_t seen_n = of.queries * width, qkv_n = seen_n + step;
    const float scale = 1.0f / std::sqrt(static_cast<float>(width));
    std::vector<X> y(hidden), qkv(qkv_n), seen(seen_n), both(2 * inside), gate(inside);
    std::vector<float> full(std::max({hidden, inside, seen_n})), z(3 * std::max<int64_t>(acting.rank, 1));
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
          widen(y.data(), hidden, full.data());
        }
        multiply(layer.qkv, layer.qkv_bias, full.data(), hidden, qkv_n, qkv.data());
#pragma omp single
        {
          update(i, 0, y.data(), hidden, qkv.data(), z.data());
          turn_row(qkv.data(), of, cosine, sine, layer.q_norm, layer.k_norm, slot + at * step);
        }
#pragma omp for schedule(static)
        for (int64_t head = 0; head < of.heads; ++head)
          attend_head(qkv.data() + head * group * width, slot, at, of.heads, head, group, width, scale, 0,
                      seen.data() + head * group * width, room);
#pragma omp single
        widen(seen.data(), seen_n, full.data());
        multiply(layer.out, layer.out_bias, full.data(), seen_n, hidden, y.data());
#pragma omp single
        {
          update(i, 1, seen.data(), seen_n, y.data(), z.data());
          add_row(x, y.data(), hidden);
          norm_row(x, layer.after, hidden, of.epsilon, y.data());
          widen(y.data(), hidden, full.data());
        }
        multiply(layer.up, layer.up_bias, full.data(), hidden, 2 * inside, both.data());
#pragma omp single
        {
          update(i, 2, y.data(), hidden, both.data(), z.data());
          gated_row(both.data(), inside, gate.data());
          widen(gate.data(), inside, full.data());
        }
        multiply(layer.down, layer.down_bias, full.data(), inside, hidden, y.data());
#pragma omp single
        update(i, 3, gate.data(), inside, y.data(), z.data());
      }
    }
    add_row(x, y.data(), hidden);
  }
};

}  // namespace

#define FOR(X, NAME)                                                                                                   \
  void single_##NAME(X* x, const void* layers, int64_t count, int64_t queries, int64_t heads, int64_t width,           \
                     float epsilon, int64_t hidden, int64_t inside, const X* cosine, const X* sine, X* held,           \
                     int64_t layer_pitch, int64_t at, const X* factors, int64_t rank, const int64_t* A,                \
                     const int64_t* B, const int64_t* m) {                                                             \
    Pass<X>{static_cast<const Layer<X>*>(layers), Heads{queries, heads, width, epsilon}, hidden, inside,               \
            Acting<X>{factors, rank, A, B, m}}                                                                         \
        .through(x, count, cosine, sine, held, layer_pitch, at);                                                       \
  }

extern "C" {
FOR(float, float32)
FOR(bf16, bfloat16)
}
