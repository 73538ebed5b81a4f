// Every instruction set gives the same bits as a scalar loop; the noise has the right moments; threads change nothing.
#include "lumiere/denoise_step.hpp"

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "check.hpp"

using namespace lumiere;

namespace {

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

void check_step(std::int64_t count, int windows, bool guided, bool multistep, bool noisy, ThreadPool& pool) {
  std::mt19937 random(static_cast<unsigned>(count * 16 + windows * 4 + guided * 2 + multistep));
  std::normal_distribution<float> normal;
  const auto fill = [&](std::size_t n) {
    std::vector<float> values(n);
    for (float& value : values) value = normal(random);
    return values;
  };
  const auto size = static_cast<std::size_t>(count);
  const std::vector<float> x = fill(size), previous = fill(size);
  std::vector<std::vector<float>> outputs;
  std::vector<Output> sources;
  for (int k = 0; k < windows; ++k) {
    outputs.push_back(fill(size));
    outputs.push_back(fill(size));
  }
  for (int k = 0; k < windows; ++k) {
    sources.push_back({outputs[2 * k].data(), guided ? outputs[2 * k + 1].data() : nullptr, 0.6f / static_cast<float>(k + 1)});
  }
  const StepCoefficients c{0.3f, 0.8f, 0.4f, 0.7f, multistep ? -0.2f : 0.0f, noisy ? 0.1f : 0.0f, 3.5f, 0.9f, 1.25f, 0.8f};
  const NoiseKey key{0x0123456789abcdefull, 1, 3, 77};

  std::vector<float> normals(size), expected(size), expected_x0(size);
  inner_loops_by_index(0)->noise(key, 0, count, normals.data());
  for (std::size_t i = 0; i < size; ++i) {
    float average = 0.0f;
    for (int k = 0; k < windows; ++k) {
      const float cond = outputs[2 * k][i], uncond = outputs[2 * k + 1][i];
      const float o = guided ? uncond + c.guidance * (cond - uncond) : cond;
      average = k == 0 ? sources[k].weight * o : average + sources[k].weight * o;
    }
    const float raw = c.u * x[i] + c.v * (average * c.gain);
    const float x0 = std::fmin(std::fmax(raw, -c.clip), c.clip) * c.scale;
    float next = c.p * x[i] + c.q * x0;
    if (multistep) next = next + c.r * previous[i];
    if (noisy) next = next + c.n * normals[i];
    expected[i] = next;
    expected_x0[i] = x0;
  }
  for (int index = 0; index < num_inner_loops(); ++index) {
    const InnerLoops* loops = inner_loops_by_index(index);
    if (loops == nullptr) continue;
    // In place: the state becomes x', x0 takes the place of the x0 before it.
    std::vector<float> state = x, x0 = previous;
    const StepPart part{state.data(), multistep ? x0.data() : nullptr, state.data(), x0.data(), sources.data(), windows,
                        ElementType::float32, c, key, 0, count};
    denoise_frames({&part, 1}, pool, *loops);
    CHECK(same_bits(state, expected));
    CHECK(same_bits(x0, expected_x0));
  }
}

void check_half_types(ThreadPool& pool) {
  // Every finite 16-bit pattern as an output; u = p = r = n = 0 and v = q = 1 hand it through.
  for (const ElementType type : {ElementType::bfloat16, ElementType::float16}) {
    std::vector<std::uint16_t> bits;
    std::vector<float> expected;
    for (int pattern = 0; pattern < 65536; ++pattern) {
      const auto half = static_cast<std::uint16_t>(pattern);
      const int exponent_bits = type == ElementType::bfloat16 ? 8 : 5, mantissa_bits = 15 - exponent_bits;
      const int exponent = (half & 0x7fff) >> mantissa_bits, mantissa = half & ((1 << mantissa_bits) - 1);
      if (exponent == (1 << exponent_bits) - 1) continue;
      const int bias = (1 << (exponent_bits - 1)) - 1;
      const float magnitude = std::ldexp(static_cast<float>(mantissa + (exponent > 0 ? 1 << mantissa_bits : 0)),
                                         std::max(exponent, 1) - bias - mantissa_bits);
      bits.push_back(half);
      expected.push_back(half & 0x8000 ? -magnitude : magnitude);
    }
    const auto count = static_cast<std::int64_t>(bits.size());
    std::vector<float> zero(bits.size(), 0.0f), next(bits.size()), x0(bits.size());
    const Output source{bits.data(), nullptr, 1.0f};
    const float infinity = std::numeric_limits<float>::infinity();
    for (int index = 0; index < num_inner_loops(); ++index) {
      if (inner_loops_by_index(index) == nullptr) continue;
      const StepPart part{zero.data(), nullptr, next.data(), x0.data(), &source, 1, type,
                          {0, 1, 0, 1, 0, 0, 1, 1, infinity, 1}, {}, 0, count};
      denoise_frames({&part, 1}, pool, *inner_loops_by_index(index));
      for (std::size_t i = 0; i < bits.size(); ++i) CHECK(x0[i] == expected[i]);
      CHECK(inner_loops_by_index(index)->all_finite(bits.data(), type, count));
      std::vector<std::uint16_t> bad = bits;
      bad[bad.size() / 2] = type == ElementType::bfloat16 ? 0x7f80 : 0x7c01;
      CHECK(!inner_loops_by_index(index)->all_finite(bad.data(), type, count));
    }
  }
}

}  // namespace

int main() {
  ThreadPool one(1), two(2), four(4);
  for (const std::int64_t count : {std::int64_t{1}, std::int64_t{37}, std::int64_t{1024}, std::int64_t{4099}, std::int64_t{200003}}) {
    for (int flags = 0; flags < 8; ++flags) {
      for (int windows = 1; windows <= 3; ++windows) {
        check_step(count, windows, flags & 1, flags & 2, flags & 4, flags & 1 ? two : flags & 2 ? four : one);
      }
    }
  }
  check_half_types(two);

  for (int index = 0; index < num_inner_loops(); ++index) {
    const InnerLoops* loops = inner_loops_by_index(index);
    if (loops == nullptr) continue;
    // Any part of a frame that starts at a multiple of four has the values of the whole.
    std::vector<float> whole(20001), part(1000);
    const NoiseKey key{42, 0, -1, 9};
    loops->noise(key, 0, 20001, whole.data());
    loops->noise(key, 8, 1000, part.data());
    CHECK(std::memcmp(whole.data() + 8, part.data(), 4000) == 0);
    std::vector<float> other(20001);
    inner_loops_by_index(0)->noise(key, 0, 20001, other.data());
    CHECK(same_bits(whole, other));
    double sum = 0, squares = 0;
    for (const float value : whole) sum += value, squares += static_cast<double>(value) * value;
    CHECK(std::abs(sum / 20001) < 0.03 && std::abs(squares / 20001 - 1.0) < 0.05);
    std::vector<float> finite(5000, 1.0f);
    CHECK(loops->all_finite(finite.data(), ElementType::float32, 5000));
    for (const float bad : {std::numeric_limits<float>::infinity(), std::nanf("")}) {
      finite[4999] = bad;
      CHECK(!loops->all_finite(finite.data(), ElementType::float32, 5000));
    }
  }

  // An exception in a piece reaches the caller, and the pool goes on working.
  for (int round = 0; round < 20; ++round) {
    check_throws<std::runtime_error>([&] {
      four.for_each(100, [](std::int64_t i) { if (i == 57) throw std::runtime_error("piece 57"); });
    }, "piece 57");
    std::vector<int> hits(1000, 0);
    four.for_each(1000, [&](std::int64_t i) { hits[static_cast<std::size_t>(i)]++; });
    for (const int hit : hits) CHECK(hit == 1);
  }
  check_throws<std::invalid_argument>([] { ThreadPool none(0); }, "num_threads=0");
  return 0;
}
