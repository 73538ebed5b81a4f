// Final frames to pixels. Values are in -1 .. 1; out of range is clamped, NaN becomes 0.
#pragma once

#include <cstdint>

#include "lumiere/inner_loops.hpp"
#include "lumiere/thread_pool.hpp"

namespace lumiere {

// round(x * 127.5 + 127.5), halves up
void to_uint8(const float* in, std::int64_t count, std::uint8_t* out, ThreadPool& pool, const InnerLoops& loops);

enum class ColourMatrix { bt601, bt709 };

// RGB frames [num_frames, height, width, 3] to planar Y, U, V, limited range (16..235, 16..240), chroma the mean of
// 2 x 2 pixels. out: [num_frames, height * width * 3 / 2]. Throws std::invalid_argument for odd sizes.
void to_yuv420p(const float* in, std::int64_t num_frames, std::int64_t height, std::int64_t width, ColourMatrix matrix,
                std::uint8_t* out, ThreadPool& pool);

}  // namespace lumiere
