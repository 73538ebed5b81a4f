// Against the formula in double; sizes that fill no vector; threads; memory beside the frames stays untouched.
#include "lumiere/group_norm.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "check.hpp"
#include "sample_data.hpp"

using namespace lumiere;

namespace {

std::uint16_t to_bfloat16(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
float to_float(std::uint16_t half) {
  const std::uint32_t bits = static_cast<std::uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
float to_float(float value) { return value; }
template <class T>
T convert(float value) {
  if constexpr (sizeof(T) == 4) return value;
  else return to_bfloat16(value);
}

template <class T>
void check(GroupNormFrame frame, std::int64_t frames, std::int64_t pixels, std::int64_t channels, std::int64_t groups,
           bool modulated, bool silu, float offset) {
  const std::size_t count = static_cast<std::size_t>(frames * pixels * channels), width = static_cast<std::size_t>(channels);
  std::vector<T> x(count), y(count + 64, convert<T>(42.0f)), weight(width), bias(width), rows(2 * 2 * width);
  for (std::size_t i = 0; i < count; ++i) x[i] = convert<T>(value_at(i) + offset);
  for (std::size_t i = 0; i < width; ++i) weight[i] = convert<T>(value_at(i + 7)), bias[i] = convert<T>(value_at(i + 19));
  for (std::size_t i = 0; i < rows.size(); ++i) rows[i] = convert<T>(value_at(i + 3));
  const std::int64_t frames_per_row = (frames + 1) / 2;
  const GroupNorm call{x.data(), y.data(), sizeof(T) == 4 ? ElementType::float32 : ElementType::bfloat16, frames, pixels,
                       channels, groups, 1e-5f, weight.data(), bias.data(), modulated ? rows.data() : nullptr,
                       modulated ? rows.data() + width : nullptr, frames_per_row, 2 * channels, silu};
  group_norm(call, frame, run_in_threads, 3);
  const std::vector<T> threaded = y;
  group_norm(call, frame, nullptr, 3);
  CHECK(std::memcmp(threaded.data(), y.data(), y.size() * sizeof(T)) == 0);

  const std::int64_t per_group = channels / groups;
  double error = 0.0, size = 0.0, condition = 1.0;
  for (std::int64_t f = 0; f < frames; ++f) {
    for (std::int64_t g = 0; g < groups; ++g) {
      const auto at = [&](std::int64_t p, std::int64_t c) {
        return static_cast<std::size_t>((f * pixels + p) * channels + g * per_group + c);
      };
      double mean = 0.0, variance = 0.0;
      for (std::int64_t p = 0; p < pixels; ++p)
        for (std::int64_t c = 0; c < per_group; ++c) mean += to_float(x[at(p, c)]);
      mean /= static_cast<double>(pixels * per_group);
      for (std::int64_t p = 0; p < pixels; ++p)
        for (std::int64_t c = 0; c < per_group; ++c) variance += std::pow(to_float(x[at(p, c)]) - mean, 2);
      variance /= static_cast<double>(pixels * per_group);
      condition = std::max(condition, std::fabs(mean) / std::sqrt(variance + 1e-5));
      for (std::int64_t p = 0; p < pixels; ++p) {
        for (std::int64_t c = 0; c < per_group; ++c) {
          const std::size_t channel = static_cast<std::size_t>(g * per_group + c);
          double v = (to_float(x[at(p, c)]) - mean) / std::sqrt(variance + 1e-5) * to_float(weight[channel]) + to_float(bias[channel]);
          if (modulated) {
            const std::size_t row = static_cast<std::size_t>(f / frames_per_row) * 2 * width + channel;
            v = v * (1.0 + to_float(rows[row])) + to_float(rows[row + width]);
          }
          if (silu) v = v / (1.0 + std::exp(-v));
          error += std::pow(to_float(y[at(p, c)]) - v, 2);
          size += v * v;
        }
      }
    }
  }
  // Rounding of the result, and of a * x + b in fp32, which cancel where the mean is many deviations from zero.
  const double bound = (sizeof(T) == 4 ? 0.0 : 0x1p-8) + 8.0 * 0x1p-23 * condition;
  CHECK(std::sqrt(error) <= bound * std::sqrt(size) + 1e-30);
  for (std::size_t i = count; i < y.size(); ++i) CHECK(to_float(y[i]) == 42.0f);
}

}  // namespace

int main() {
  for (int index = 0; index < num_inner_loops(); ++index) {
    const GroupNormFrame frame = group_norm_frame_by_index(index);
    if (frame == nullptr) continue;
    for (const bool modulated : {false, true}) {
      for (const bool silu : {false, true}) {
        for (const auto& [frames, pixels, channels, groups] :
             std::vector<std::array<std::int64_t, 4>>{{1, 1, 1, 1}, {2, 3, 5, 5}, {3, 7, 83, 1}, {5, 300, 64, 4}, {2, 257, 96, 6}}) {
          check<float>(frame, frames, pixels, channels, groups, modulated, silu, 0.0f);
          check<std::uint16_t>(frame, frames, pixels, channels, groups, modulated, silu, 0.0f);
        }
        check<float>(frame, 2, 1000, 64, 4, modulated, silu, 300.0f);  // a mean of 150 deviations
      }
    }
    // Large and small arguments of SiLU, NaN and infinity: one pixel and one channel give the bias.
    const float inf = INFINITY;
    for (const auto& [in, expected] : std::vector<std::array<float, 2>>{{100.0f, 100.0f}, {-100.0f, 0.0f}, {0.0f, 0.0f}, {inf, inf}}) {
      const float x = 3.0f, weight = 1.0f;
      float y = 42.0f;
      const GroupNorm call{&x, &y, ElementType::float32, 1, 1, 1, 1, 1e-5f, &weight, &in, nullptr, nullptr, 1, 1, true};
      group_norm(call, frame, nullptr, 1);
      CHECK(y == expected || std::fabs(y - expected) < 1e-30f);
    }
    const float nan = NAN, one = 1.0f;
    float y = 42.0f;
    group_norm({&nan, &y, ElementType::float32, 1, 1, 1, 1, 1e-5f, &one, &one, nullptr, nullptr, 1, 1, true}, frame, nullptr, 1);
    CHECK(std::isnan(y));
    const std::uint16_t nan16 = 0x7fc0, one16 = 0x3f80;
    std::uint16_t y16 = 0;
    group_norm({&nan16, &y16, ElementType::bfloat16, 1, 1, 1, 1, 1e-5f, &one16, &one16, nullptr, nullptr, 1, 1, true}, frame, nullptr, 1);
    CHECK(std::isnan(to_float(y16)));
  }
  return 0;
}
