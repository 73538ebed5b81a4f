// GroupNorm per frame, an affine modulation and SiLU in one pass over a frame that stays in the cache.
#pragma once

#include <cstdint>

#include "lumiere/inner_loops.hpp"
#include "lumiere/parallel_region.hpp"

namespace lumiere {

// y = silu(normed * (1 + scale) + shift), normed = (x - mean) / sqrt(variance + eps) * weight + bias, with mean and
// variance over the pixels of one frame and the channels of one group. All arrays have one type, fp32 or bf16; x and y
// are [frames, pixels, channels]. Frame f uses row f / frames_per_row of scale and shift, `row_stride` values apart.
struct GroupNorm {
  const void* x;
  void* y;
  ElementType type;
  std::int64_t frames, pixels, channels, groups;
  float eps;
  const void *weight, *bias;    // [channels]
  const void *scale, *shift;    // both null: none
  std::int64_t frames_per_row, row_stride;
  bool silu;
};

// Of one frame; `scratch` holds kGroupNormScratch * channels doubles. Channels are summed in fp32 about their first
// value, 256 pixels at a time, then in double; the (count, mean, M2) of a group's channels are merged in their order.
using GroupNormFrame = void (*)(const GroupNorm& call, std::int64_t frame, double* scratch);
constexpr int kGroupNormScratch = 3;

// For the fastest instruction set of this processor, or by the index of `inner_loops_by_index`; null where it does not run.
GroupNormFrame group_norm_frame();
GroupNormFrame group_norm_frame_by_index(int index);

// Runs all frames. Results do not depend on the number of threads.
void group_norm(const GroupNorm& call, GroupNormFrame frame, ParallelRegion parallel, int num_threads);

}  // namespace lumiere
