// The CUDA step of kernels/csrc, for callers that are compiled without CUDA headers.
#pragma once

#include <cstdint>

#include "denoise_step.cuh"

namespace lumiere {

// Enqueue on `stream` (a cudaStream_t) of the current device; neither synchronises. Throw std::runtime_error with
// CUDA's text when the launch fails.
void denoise_step_on_stream(const DenoiseStepArgs& args, OutType out_type, std::uintptr_t stream);
void frame_noise_on_stream(float* noise, const std::int64_t* key, std::int64_t num_frames, std::int64_t positions,
                           std::uintptr_t stream);

}  // namespace lumiere
