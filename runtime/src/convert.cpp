#include "lumiere/convert.hpp"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace lumiere {

void to_uint8(const float* in, std::int64_t count, std::uint8_t* out, ThreadPool& pool, const InnerLoops& loops) {
  constexpr std::int64_t kPart = 1 << 17;
  pool.for_each((count + kPart - 1) / kPart, [&](std::int64_t i) {
    loops.to_uint8(in + i * kPart, std::min(kPart, count - i * kPart), out + i * kPart);
  });
}

namespace {

float clamp_to(float value, float low, float high) {
  value = value > low ? value : low;  // NaN too
  return value < high ? value : high;
}

// y = 16 + 219 luma, u = 128 + 224 (b - luma) / (2 (1 - kb)), v likewise with r; r, g, b in 0..1.
void convert_rows(const float* in, std::int64_t height, std::int64_t width, std::int64_t row, float kr, float kb,
                  std::uint8_t* out) {
  const float kg = 1.0f - kr - kb;
  const float u_scale = 112.0f / (1.0f - kb), v_scale = 112.0f / (1.0f - kr);
  std::uint8_t* u_plane = out + height * width;
  std::uint8_t* v_plane = u_plane + (height / 2) * (width / 2);
  for (std::int64_t column = 0; column < width; column += 2) {
    float red = 0.0f, blue = 0.0f, luma = 0.0f;
    for (std::int64_t dy = 0; dy < 2; ++dy) {
      for (std::int64_t dx = 0; dx < 2; ++dx) {
        const float* pixel = in + ((row + dy) * width + column + dx) * 3;
        const float r = clamp_to(pixel[0] * 0.5f + 0.5f, 0.0f, 1.0f);
        const float g = clamp_to(pixel[1] * 0.5f + 0.5f, 0.0f, 1.0f);
        const float b = clamp_to(pixel[2] * 0.5f + 0.5f, 0.0f, 1.0f);
        const float y = (kr * r + kg * g) + kb * b;
        red = red + r, blue = blue + b, luma = luma + y;
        out[(row + dy) * width + column + dx] = static_cast<std::uint8_t>(clamp_to(219.0f * y + 16.5f, 16.0f, 235.0f));
      }
    }
    const std::int64_t chroma = (row / 2) * (width / 2) + column / 2;
    const float u = u_scale * ((blue - luma) * 0.25f) + 128.5f, v = v_scale * ((red - luma) * 0.25f) + 128.5f;
    u_plane[chroma] = static_cast<std::uint8_t>(clamp_to(u, 16.0f, 240.0f));
    v_plane[chroma] = static_cast<std::uint8_t>(clamp_to(v, 16.0f, 240.0f));
  }
}

}  // namespace

void to_yuv420p(const float* in, std::int64_t num_frames, std::int64_t height, std::int64_t width, ColourMatrix matrix,
                std::uint8_t* out, ThreadPool& pool) {
  if (height % 2 != 0 || width % 2 != 0) {
    throw std::invalid_argument("yuv420p needs even sizes, got height=" + std::to_string(height) +
                                " width=" + std::to_string(width));
  }
  const float kr = matrix == ColourMatrix::bt601 ? 0.299f : 0.2126f;
  const float kb = matrix == ColourMatrix::bt601 ? 0.114f : 0.0722f;
  pool.for_each(num_frames * (height / 2), [&](std::int64_t i) {
    const std::int64_t frame = i / (height / 2), row = 2 * (i % (height / 2));
    convert_rows(in + frame * height * width * 3, height, width, row, kr, kb, out + frame * height * width * 3 / 2);
  });
}

}  // namespace lumiere
