#include "lumiere/denoise_step_cuda.hpp"

#include <stdexcept>
#include <string>

namespace lumiere {

namespace {

void check(cudaError_t status) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // clears it
  throw std::runtime_error(std::string(cudaGetErrorName(status)) + ": " + cudaGetErrorString(status));
}

}  // namespace

void denoise_step_on_stream(const DenoiseStepArgs& args, OutType out_type, std::uintptr_t stream) {
  check(launch_denoise_step(args, out_type, reinterpret_cast<cudaStream_t>(stream)));
}

void frame_noise_on_stream(float* noise, const std::int64_t* key, std::int64_t num_frames, std::int64_t positions,
                           std::uintptr_t stream) {
  check(launch_frame_noise(noise, key, num_frames, positions, reinterpret_cast<cudaStream_t>(stream)));
}

}  // namespace lumiere
