#include "denoise_step.cuh"

namespace lumiere {
namespace {

constexpr int kThreads = 256;

// One thread works on four positions, those of one counter. Blocks are numbered frame by frame along x.
template <typename T, bool kVector>
__global__ void __launch_bounds__(kThreads) denoise_step_kernel(const DenoiseStepArgs args, const int blocks_per_frame) {
    const std::int64_t frame = blockIdx.x / blocks_per_frame;
    const std::int64_t counter = std::int64_t{blockIdx.x % blocks_per_frame} * kThreads + threadIdx.x;
    if (4 * counter < args.positions) denoise_quad<T, kVector>(args, frame, counter);
}

template <bool kVector>
__global__ void __launch_bounds__(kThreads)
    frame_noise_kernel(float* noise, const std::int64_t* key, const std::int64_t positions, const int blocks_per_frame) {
    const std::int64_t frame = blockIdx.x / blocks_per_frame;
    const std::int64_t counter = std::int64_t{blockIdx.x % blocks_per_frame} * kThreads + threadIdx.x;
    const std::int64_t left = positions - 4 * counter;
    if (left <= 0) return;
    const Quad normals = noise_quad(key + frame * 5, static_cast<std::uint32_t>(counter));
    store_quad<kVector>(noise + frame * positions + 4 * counter, normals, left < 4 ? static_cast<int>(left) : 4);
}

// Blocks for one frame, or 0 where the launch would not fit.
int blocks_for(std::int64_t num_frames, std::int64_t positions) {
    if (num_frames < 1 || positions < 1) return 0;
    const std::int64_t blocks = (positions + 4 * kThreads - 1) / (4 * kThreads);
    constexpr std::int64_t kMostBlocks = 2147483647;
    return blocks > kMostBlocks / num_frames ? 0 : static_cast<int>(blocks);
}

bool aligned(const void* pointer, std::uintptr_t bytes) { return reinterpret_cast<std::uintptr_t>(pointer) % bytes == 0; }

template <typename T>
cudaError_t launch(const DenoiseStepArgs& args, int blocks, cudaStream_t stream) {
    const bool vector = args.positions % 4 == 0 && aligned(args.x, 16) && aligned(args.x0_prev, 16) &&
                        aligned(args.x_new, 16) && aligned(args.x0_new, 16) && aligned(args.out, 4 * sizeof(T)) &&
                        aligned(args.kept, 4 * sizeof(T));
    const auto kernel = vector ? denoise_step_kernel<T, true> : denoise_step_kernel<T, false>;
    kernel<<<static_cast<unsigned>(blocks * args.num_frames), kThreads, 0, stream>>>(args, blocks);
    return cudaGetLastError();
}

}  // namespace

cudaError_t launch_denoise_step(const DenoiseStepArgs& args, OutType out_type, cudaStream_t stream) {
    const int blocks = blocks_for(args.num_frames, args.positions);
    if (blocks == 0 || args.num_windows < 1 || (args.num_outputs != 1 && args.num_outputs != 2)) {
        return cudaErrorInvalidValue;
    }
    switch (out_type) {
        case OutType::kFloat32: return launch<float>(args, blocks, stream);
        case OutType::kFloat16: return launch<__half>(args, blocks, stream);
        case OutType::kBFloat16: return launch<__nv_bfloat16>(args, blocks, stream);
    }
    return cudaErrorInvalidValue;
}

cudaError_t launch_frame_noise(
    float* noise, const std::int64_t* key, std::int64_t num_frames, std::int64_t positions, cudaStream_t stream) {
    const int blocks = blocks_for(num_frames, positions);
    if (blocks == 0) return cudaErrorInvalidValue;
    const auto kernel = positions % 4 == 0 && aligned(noise, 16) ? frame_noise_kernel<true> : frame_noise_kernel<false>;
    kernel<<<static_cast<unsigned>(blocks * num_frames), kThreads, 0, stream>>>(noise, key, positions, blocks);
    return cudaGetLastError();
}

}  // namespace lumiere
