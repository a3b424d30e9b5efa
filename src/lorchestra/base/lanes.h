// Numbers of either dtype, one at a time and as lanes that are computed at once; sums are float32 throughout.

#pragma once

#include <cstdint>
#include <cstring>

namespace {

struct bf16 {
  uint16_t bits;
};

inline float wide(float value) { return value; }

inline float wide(bf16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

inline void narrow(float value, float* out) { *out = value; }

// Round to nearest, ties to even; NaN stays NaN.
inline void narrow(float value, bf16* out) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out->bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

// Lanes that are computed at once; compilers split them where the processor has fewer.
constexpr int64_t LANES = 16;
typedef float floats4 __attribute__((vector_size(16)));
typedef float floats8 __attribute__((vector_size(32)));
typedef float floats16 __attribute__((vector_size(64)));
typedef uint32_t words16 __attribute__((vector_size(64)));
typedef uint16_t halves16 __attribute__((vector_size(32)));

inline void load(const float* from, floats16* out) { std::memcpy(out, from, sizeof *out); }

inline void load(const bf16* from, floats16* out) {
  halves16 in;
  std::memcpy(&in, from, sizeof in);
  const words16 bits = __builtin_convertvector(in, words16) << 16;
  std::memcpy(out, &bits, sizeof *out);
}

// A core waits for memory most of the time, and for several pieces at once if it reads them side by side.
constexpr int64_t STREAMS = 4, FAR = 1024;  // pieces; bytes ahead of each that are fetched

// What lies `ahead` bytes before `count` numbers.
template <class X>
inline void fetch(const X* from, int64_t count, int64_t ahead) {
  for (int64_t byte = 0; byte < static_cast<int64_t>(count * sizeof(X)); byte += 64)
    __builtin_prefetch(reinterpret_cast<const char*>(from) + ahead + byte);
}

inline void store(floats16 value, float* out) { std::memcpy(out, &value, sizeof value); }

// Rounded as `narrow` does, in the upper half of each word.
inline words16 rounded(floats16 value) {
  words16 bits;
  std::memcpy(&bits, &value, sizeof bits);
  return (bits & 0x7fffffffu) > 0x7f800000u ? words16{} + 0x7fc00000u : bits + 0x7fffu + ((bits >> 16) & 1u);
}

inline void store(floats16 value, bf16* out) {
  const halves16 narrowed = __builtin_convertvector(rounded(value) >> 16, halves16);
  std::memcpy(out, &narrowed, sizeof narrowed);
}

// Two times LANES numbers that lie together, of bfloat16 those at even places and those at odd ones: to part them so is
// cheaper than in any other way. A sum of products does not mind the order, and `store_pair` undoes it.
constexpr int64_t PAIR = 2 * LANES;

inline void load_pair(const float* from, floats16* one, floats16* two) {
  load(from, one);
  load(from + LANES, two);
}

inline void load_pair(const bf16* from, floats16* one, floats16* two) {
  words16 both;
  std::memcpy(&both, from, sizeof both);
  const words16 even = both << 16, odd = both & 0xffff0000u;
  std::memcpy(one, &even, sizeof *one);
  std::memcpy(two, &odd, sizeof *two);
}

inline void store_pair(floats16 one, floats16 two, float* out) {
  store(one, out);
  store(two, out + LANES);
}

inline void store_pair(floats16 one, floats16 two, bf16* out) {
  const words16 both = (rounded(one) >> 16) | (rounded(two) & 0xffff0000u);
  std::memcpy(out, &both, sizeof both);
}

// Numbers of one dtype as those of another: wide ones lie in the order of pairs, but for those after the last whole pair.
template <class From, class To>
inline void convert(const From* from, int64_t n, To* to) {
  floats16 one, two;
  int64_t j = 0;
  for (; j + PAIR <= n; j += PAIR) {
    load_pair(from + j, &one, &two);
    store_pair(one, two, to + j);
  }
  for (; j < n; ++j) narrow(wide(from[j]), to + j);
}

inline float total(floats16 value) {
  floats8 halves[2];
  std::memcpy(halves, &value, sizeof value);
  const floats8 eight = halves[0] + halves[1];
  floats4 quarters[2];
  std::memcpy(quarters, &eight, sizeof eight);
  const floats4 four = quarters[0] + quarters[1];
  return (four[0] + four[2]) + (four[1] + four[3]);
}

// e^x for x <= 0 (Cody & Waite 1980: a power of two times a polynomial on [-ln 2 / 2, ln 2 / 2]), 2 units in the last place.
inline floats16 exponential(floats16 x) {
  typedef int32_t integers16 __attribute__((vector_size(64)));
  x = x < -87.0f ? floats16{} - 87.0f : x;
  const floats16 shift = floats16{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
  const floats16 n = (x * 1.44269504f + shift) - shift;
  const floats16 r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  floats16 p = floats16{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const integers16 bits = (__builtin_convertvector(n, integers16) + 127) << 23;
  floats16 scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return p * scale;
}

}  // namespace
