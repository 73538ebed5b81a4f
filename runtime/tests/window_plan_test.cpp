// Every (length, window, overlap, loop, halo): exact cover, weights that sum to one, readers and writers that agree.
#include "lumiere/window_plan.hpp"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "check.hpp"

using namespace lumiere;

namespace {

void check_plan(const WindowPlan& plan) {
  const std::int64_t frames = plan.num_frames(), windows = plan.num_windows();
  std::vector<std::vector<std::int64_t>> writers(frames), readers(frames);
  std::vector<std::int64_t> list;
  for (std::int64_t w = 0; w < windows; ++w) {
    CHECK(plan.start(w) >= 0);
    if (w > 0) CHECK(plan.start(w) > plan.start(w - 1));
    plan.frames_read(w, list);
    for (int i = 0; i < plan.call_frames(); ++i) {
      const std::int64_t frame = plan.frame_at(w, i);
      CHECK(frame >= 0 && frame < frames);
      CHECK(std::count(list.begin(), list.end(), frame) == 1);
    }
    for (const std::int64_t frame : list) readers[frame].push_back(w);
    for (std::int64_t frame = 0; frame < frames; ++frame) {
      const int position = plan.written_position(w, frame);
      if (position < 0) continue;
      CHECK(position >= plan.halo() && position < plan.halo() + plan.window());
      CHECK(plan.frame_at(w, position) == frame);
      writers[frame].push_back(w);
    }
  }
  if (!plan.loop() && frames >= plan.window()) CHECK(plan.start(windows - 1) + plan.window() == frames);
  for (std::int64_t frame = 0; frame < frames; ++frame) {
    CHECK(!writers[frame].empty());
    CHECK(static_cast<int>(writers[frame].size()) <= plan.max_writers());
    plan.writers(frame, list);
    CHECK(list == writers[frame]);
    std::vector<float> weights;
    plan.frame_weights(frame, list, weights);
    double sum = 0.0;
    for (const float weight : weights) {
      CHECK(weight > 0.0f);
      sum += weight;
    }
    CHECK(std::abs(sum - 1.0) < 1e-6);
    plan.readers(frame, list);
    CHECK(list == readers[frame]);
  }
}

}  // namespace

int main() {
  for (const WeightShape shape : {WeightShape::flat, WeightShape::linear, WeightShape::gaussian}) {
    for (int window = 1; window <= 9; ++window) {
      for (int overlap = 0; overlap < window; ++overlap) {
        for (std::int64_t frames = 1; frames <= 33; frames += shape == WeightShape::flat ? 1 : 4) {
          for (const int halo : {0, 2}) {
            for (const int multiple : {1, 4}) {
              for (const bool loop : {false, true}) check_plan({frames, window, overlap, shape, loop, halo, multiple});
            }
          }
        }
      }
    }
  }
  // Lumiere's 80 frames: 13 windows of 8 with 2 shared frames fit exactly; windows of 16 need the last one moved back.
  const WindowPlan eight(80, 8, 2), sixteen(80, 16, 2);
  CHECK(eight.num_windows() == 13 && eight.start(12) == 72);
  CHECK(sixteen.num_windows() == 6 && sixteen.start(5) == 64 && sixteen.start(4) == 56);
  CHECK(WindowPlan(3, 8, 2).call_frames() == 8 && WindowPlan(3, 8, 2).frame_at(0, 7) == 2);
  CHECK(WindowPlan(3, 8, 2, WeightShape::flat, true).frame_at(0, 7) == 1);
  CHECK(WindowPlan(80, 5, 0, WeightShape::flat, false, 1, 4).call_frames() == 8);

  check_throws<std::invalid_argument>([] { WindowPlan(80, 8, 8); }, "overlap=8");
  check_throws<std::invalid_argument>([] { WindowPlan(80, 8, -1); }, "overlap=-1");
  check_throws<std::invalid_argument>([] { WindowPlan(80, 0, 0); }, "window=0");
  check_throws<std::invalid_argument>([] { WindowPlan(0, 8, 2); }, "num_frames=0");
  check_throws<std::invalid_argument>([] { WindowPlan(std::nullopt, 8, 2, WeightShape::flat, true); }, "loop");
  check_throws<std::invalid_argument>([] { WindowPlan(80, 8, 2, WeightShape::flat, false, -1); }, "halo=-1");
  check_throws<std::invalid_argument>([] { WindowPlan(80, 8, 2, WeightShape::flat, false, 0, 0); }, "multiple=0");
  check_throws<std::invalid_argument>([] { weight_shape_from_name("cubic"); }, "cubic");
  check_throws<std::logic_error>([] { static_cast<void>(WindowPlan(std::nullopt, 8, 2).num_windows()); }, "unknown");
  return 0;
}
