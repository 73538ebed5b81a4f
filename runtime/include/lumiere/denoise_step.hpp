// The sampler step of many frames on the CPU: threads over frames and parts of frames.
#pragma once

#include <span>

#include "lumiere/inner_loops.hpp"
#include "lumiere/thread_pool.hpp"

namespace lumiere {

// Whole frames: `position` is 0 and `count` the frame's values.
void denoise_frames(std::span<const StepPart> frames, ThreadPool& pool, const InnerLoops& loops);

}  // namespace lumiere
