// The sampler's buffers: a whole clip through the wavefront equals one that is stepped whole; faults change nothing.
#include "lumiere/sampler.hpp"

#include <cmath>
#include <cstring>
#include <limits>
#include <string>

#include "check.hpp"

using namespace lumiere;

namespace {

constexpr std::int64_t kValues = 45;

ClipSettings settings(int steps, std::uint64_t seed) {
  ClipSettings s;
  s.seed = seed;
  s.stage = 1;
  for (int i = 0; i < steps; ++i) s.table.push_back({0.4f, 0.5f, 0.6f, 0.3f, i > 0 ? -0.1f : 0.0f, 0.2f});
  s.table.back() = {0.4f, 0.5f, 0.0f, 1.0f, 0.0f, 0.0f};
  return s;
}

// Each value of a window depends on its frame before and after, and on the window.
void denoise(std::span<const Task> tasks, int call_frames, const std::vector<float>& x, std::vector<float>& out) {
  for (std::size_t i = 0; i < tasks.size() * static_cast<std::size_t>(call_frames); ++i) {
    const std::size_t row = i / call_frames * call_frames;
    for (std::size_t j = 0; j < kValues; ++j) {
      const float next = x[(row + (i + 1) % call_frames) * kValues + j];
      out[i * kValues + j] = 0.5f * x[i * kValues + j] - 0.25f * next + 0.01f * static_cast<float>(tasks[i / call_frames].window);
    }
  }
}

// Walks `plan` with the given batches; the order of work differs, the frames must not.
std::vector<float> run(const WindowPlan& plan, int steps, int capacity, int threads, const InnerLoops* loops) {
  Sampler sampler(kValues, 1, threads, loops);
  const std::int64_t clip = sampler.add_clip(plan, settings(steps, 99), capacity);
  const auto frame_bytes = static_cast<std::size_t>(kValues);
  std::vector<float> result(static_cast<std::size_t>(plan.num_frames()) * frame_bytes);
  std::vector<float> x(static_cast<std::size_t>(capacity * plan.call_frames()) * frame_bytes), out(x.size());
  std::int64_t taken = 0;
  while (!sampler.wavefront().is_finished(clip)) {
    const auto tasks = sampler.next(capacity);
    CHECK(!tasks.empty());
    sampler.gather(x.data());
    denoise(tasks, plan.call_frames(), x, out);
    sampler.complete(out.data(), ElementType::float32, capacity);
    taken += sampler.take_final(clip, plan.num_frames() - taken, result.data() + static_cast<std::size_t>(taken) * frame_bytes);
  }
  CHECK(taken == plan.num_frames());
  return result;
}

}  // namespace

int main() {
  for (const bool loop : {false, true}) {
    for (const int halo : {0, 2}) {
      const WindowPlan plan(101, 8, 3, WeightShape::gaussian, loop, halo);
      const std::vector<float> one = run(plan, 5, 1, 1, inner_loops_by_index(0));
      for (const int capacity : {2, 7}) CHECK(run(plan, 5, capacity, 3, nullptr) == one);
      // With a capacity beyond all windows the walk is step by step.
      CHECK(run(plan, 5, 64, 2, nullptr) == one);
    }
  }

  Sampler sampler(kValues, 2, 2);
  const WindowPlan plan(40, 8, 2);
  const std::int64_t first = sampler.add_clip(plan, settings(3, 1), 2), second = sampler.add_clip(plan, settings(3, 2), 2);
  const auto tasks = sampler.next(2);
  CHECK(tasks.size() == 2 && tasks[0].clip != tasks[1].clip);
  std::vector<float> x(2 * 8 * kValues), out(2 * x.size(), 0.25f);
  sampler.gather(x.data());
  // One NaN in the unconditional output of the second task's window.
  out[x.size() + 8 * kValues + 5 * kValues + 7] = std::numeric_limits<float>::quiet_NaN();
  check_throws<NonFiniteOutput>([&] { sampler.complete(out.data(), ElementType::float32, 2); }, "stage 1, step 0, window 0");
  try {
    sampler.complete(out.data(), ElementType::float32, 2);
  } catch (const NonFiniteOutput& error) {
    CHECK(error.task.clip == second);
  }
  check_throws<std::logic_error>([&] { sampler.next(2); }, "has not been completed");
  check_throws<std::logic_error>([&] { sampler.abandon(); }, "clip 0");
  sampler.remove_clip(second);
  sampler.complete(out.data(), ElementType::float32, 2);  // the other clip goes on
  CHECK(sampler.next(2).size() == 2);
  sampler.remove_clip(first);
  sampler.abandon();
  CHECK(sampler.next(2).empty());
  check_throws<std::invalid_argument>([&] { sampler.add_clip(plan, ClipSettings{}, 1); }, "no steps");
  check_throws<std::invalid_argument>([] { Sampler wrong(10, 3, 1); }, "num_outputs=3");
  return 0;
}
