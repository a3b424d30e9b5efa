// Every row of a batch attends to its own slot, with one query position.
//
// A row's queries are [heads, group, width], its answer too.

#include "attention.h"

namespace {

template <class X>
void attend(const X* q, int64_t q_pitch, const X* slots, int64_t slot_pitch, const int64_t* at, int64_t rows,
            int64_t heads, int64_t group, int64_t width, float scale, int64_t window, X* out) {
#pragma omp parallel
  {
    std::vector<float> room;
#pragma omp for schedule(static) collapse(2)
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t head = 0; head < heads; ++head) {
        const int64_t own = head * group * width;
        const X *slot = slots + row * slot_pitch, *next = row + 1 < rows ? slot + slot_pitch : nullptr;
        attend_head(q + row * q_pitch + own, slot, at[row], heads, head, group, width, scale, window, next,
                    out + row * heads * group * width + own, room);
      }
  }
}

}  // namespace

extern "C" {

void attend_float32(const float* q, int64_t q_pitch, const float* slots, int64_t slot_pitch, const int64_t* at,
                    int64_t rows, int64_t heads, int64_t group, int64_t width, float scale, int64_t window, float* out) {
  attend(q, q_pitch, slots, slot_pitch, at, rows, heads, group, width, scale, window, out);
}

void attend_bfloat16(const bf16* q, int64_t q_pitch, const bf16* slots, int64_t slot_pitch, const int64_t* at,
                     int64_t rows, int64_t heads, int64_t group, int64_t width, float scale, int64_t window, bf16* out) {
  attend(q, q_pitch, slots, slot_pitch, at, rows, heads, group, width, scale, window, out);
}
}
