// Pixels: rounding, clamping, NaN, and the colours whose yuv values are in the standards.
#include "lumiere/convert.hpp"

#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "check.hpp"

using namespace lumiere;

int main() {
  ThreadPool pool(2);
  const float nan = std::numeric_limits<float>::quiet_NaN(), infinity = std::numeric_limits<float>::infinity();
  for (int index = 0; index < num_inner_loops(); ++index) {
    if (inner_loops_by_index(index) == nullptr) continue;
    std::vector<float> in = {-1.0f, 1.0f, 0.0f, -2.0f, 7.0f, nan, infinity, -infinity};
    const std::vector<int> expected = {0, 255, 128, 0, 255, 0, 255, 0};
    for (int level = 0; level < 256; ++level) in.push_back(static_cast<float>(level) / 127.5f - 1.0f);
    in.resize(300000, 0.5f);
    std::vector<std::uint8_t> out(in.size());
    to_uint8(in.data(), static_cast<std::int64_t>(in.size()), out.data(), pool, *inner_loops_by_index(index));
    for (std::size_t i = 0; i < expected.size(); ++i) CHECK(out[i] == expected[i]);
    for (int level = 0; level < 256; ++level) CHECK(out[expected.size() + static_cast<std::size_t>(level)] == level);
    CHECK(out.back() == 191);
  }
  // red, green, blue, white, black: Y U V in 8 bits, limited range
  const float colours[5][3] = {{1, -1, -1}, {-1, 1, -1}, {-1, -1, 1}, {1, 1, 1}, {-1, -1, -1}};
  const int bt601[5][3] = {{81, 90, 240}, {145, 54, 34}, {41, 240, 110}, {235, 128, 128}, {16, 128, 128}};
  const int bt709[5][3] = {{63, 102, 240}, {173, 42, 26}, {32, 240, 118}, {235, 128, 128}, {16, 128, 128}};
  for (int colour = 0; colour < 5; ++colour) {
    std::vector<float> frames;
    for (int pixel = 0; pixel < 2 * 4 * 6; ++pixel) frames.insert(frames.end(), colours[colour], colours[colour] + 3);
    for (const ColourMatrix matrix : {ColourMatrix::bt601, ColourMatrix::bt709}) {
      const int* expected = matrix == ColourMatrix::bt601 ? bt601[colour] : bt709[colour];
      std::vector<std::uint8_t> out(2 * 36);
      to_yuv420p(frames.data(), 2, 4, 6, matrix, out.data(), pool);
      for (int i = 0; i < 72; ++i) {
        const int place = i % 36, plane = place < 24 ? 0 : place < 30 ? 1 : 2;
        CHECK(out[static_cast<std::size_t>(i)] == expected[plane]);
      }
    }
  }
  check_throws<std::invalid_argument>([&] { to_yuv420p(nullptr, 1, 3, 4, ColourMatrix::bt601, nullptr, pool); }, "height=3");
  return 0;
}
