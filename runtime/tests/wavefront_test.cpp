// Every task exactly once, never before the frames it reads are there, buffers within their bound, every frame final.
#include "lumiere/wavefront.hpp"

#include <algorithm>
#include <map>
#include <random>
#include <set>
#include <stdexcept>
#include <string>

#include "check.hpp"

using namespace lumiere;

namespace {

// Walks one clip and keeps its own account of what each frame has become.
struct Account {
  WindowPlan plan;
  int steps;
  std::int64_t id = -1, taken = 0;
  std::map<std::int64_t, int> version{};             // frames that have a slot
  std::map<int, std::int64_t> owner{};               // slot -> frame
  std::set<std::pair<std::int64_t, int>> done{};     // (window, step)
  std::set<int> kept{};                              // rows in use
  std::size_t most_slots = 0, most_kept = 0;

  void on_fresh(const FreshFrame& fresh) {
    CHECK(!version.contains(fresh.frame));
    CHECK(!owner.contains(fresh.slot));
    version[fresh.frame] = 0;
    owner[fresh.slot] = fresh.frame;
    most_slots = std::max(most_slots, owner.size());
  }
  void on_task(const Task& task) {
    std::vector<std::int64_t> frames;
    plan.frames_read(task.window, frames);
    for (const std::int64_t frame : frames) CHECK(version.at(frame) == task.step);
    CHECK(done.emplace(task.window, task.step).second);
  }
  void on_step(const FrameStep& step, std::span<const Source> sources) {
    CHECK(owner.at(step.slot) == step.frame);
    CHECK(version.at(step.frame)++ == step.step);
    std::vector<std::int64_t> readers, writers;
    plan.readers(step.frame, readers);
    plan.writers(step.frame, writers);
    for (const std::int64_t w : readers) CHECK(done.contains({w, step.step}));
    CHECK(sources.size() == writers.size());
    for (const Source& source : sources) {
      if (source.row >= 0) CHECK(kept.erase(source.row) == 1);
    }
  }
};

void walk(std::vector<Account>& clips, int capacity, std::mt19937& random) {
  Wavefront wavefront;
  for (Account& clip : clips) clip.id = wavefront.add_clip(clip.plan, clip.steps, capacity);
  const auto at = [&](std::int64_t id) -> Account& {
    return *std::find_if(clips.begin(), clips.end(), [id](const Account& c) { return c.id == id; });
  };
  std::vector<Task> tasks;
  std::vector<FreshFrame> fresh;
  Completion completion;
  for (;;) {
    wavefront.next(capacity, tasks, fresh);
    if (tasks.empty()) break;
    for (const FreshFrame& f : fresh) at(f.clip).on_fresh(f);
    for (const Task& task : tasks) at(task.clip).on_task(task);
    wavefront.complete(tasks, completion);
    for (const FrameStep& step : completion.steps) {
      at(step.clip).on_step(step, std::span(completion.sources).subspan(step.first_source, step.num_sources));
    }
    for (const KeptRow& row : completion.kept) {
      Account& clip = at(row.clip);
      CHECK(clip.kept.insert(row.kept_row).second);
      CHECK(row.kept_row < wavefront.sizes(row.clip).rows);
      clip.most_kept = std::max(clip.most_kept, clip.kept.size());
    }
    for (Account& clip : clips) {
      const std::int64_t end = wavefront.final_end(clip.id);
      for (; clip.taken < end; ++clip.taken) {
        CHECK(clip.version.at(clip.taken) == clip.steps);
        clip.owner.erase(wavefront.slot(clip.id, clip.taken));
        wavefront.release(clip.id, 1);
      }
      CHECK(wavefront.released(clip.id) == clip.taken);
    }
    // A consumer in no hurry: nothing is lost when frames are not taken at once.
    if (random() % 8 == 0) continue;
  }
  for (const Account& clip : clips) {
    CHECK(wavefront.is_finished(clip.id));
    CHECK(clip.taken == clip.plan.num_frames());
    CHECK(clip.done.size() == static_cast<std::size_t>(clip.plan.num_windows() * clip.steps));
    CHECK(clip.kept.empty());
    CHECK(clip.most_slots <= static_cast<std::size_t>(wavefront.sizes(clip.id).slots()));
    CHECK(wavefront.first_needed(clip.id) == clip.plan.num_frames());
  }
}

int evaluations_to_first_frame(std::int64_t windows, int steps, int capacity) {
  Wavefront wavefront;
  const std::int64_t id = wavefront.add_clip(WindowPlan(8 + 6 * (windows - 1), 8, 2), steps, capacity);
  std::vector<Task> tasks;
  std::vector<FreshFrame> fresh;
  Completion completion;
  int evaluations = 0;
  while (wavefront.final_end(id) == 0) {
    wavefront.next(capacity, tasks, fresh);
    evaluations += static_cast<int>(tasks.size());
    wavefront.complete(tasks, completion);
  }
  return evaluations;
}

void unknown_length(int frames, int capacity) {
  Wavefront wavefront;
  const std::int64_t id = wavefront.add_clip(WindowPlan(std::nullopt, 8, 2), 3, capacity);
  std::vector<Task> tasks;
  std::vector<FreshFrame> fresh;
  Completion completion;
  std::int64_t available = 0;
  while (!wavefront.is_finished(id)) {
    const std::int64_t wanted = wavefront.frames_wanted(id, capacity);
    if (wanted > 0) {
      available = std::min<std::int64_t>(frames, wanted);
      wavefront.extend(id, available, available == frames);
    }
    wavefront.next(capacity, tasks, fresh);
    CHECK(!tasks.empty() || available < frames);
    wavefront.complete(tasks, completion);
    wavefront.release(id, wavefront.final_end(id) - wavefront.released(id));
  }
  CHECK(wavefront.released(id) == frames);
}

}  // namespace

int main() {
  std::mt19937 random(7);
  const auto pick = [&](int low, int high) { return low + static_cast<int>(random() % static_cast<unsigned>(high - low + 1)); };
  for (int round = 0; round < 1500; ++round) {
    std::vector<Account> clips;
    const int window = pick(1, 9), halo = pick(0, 3) == 3 ? pick(1, 3) : 0, multiple = pick(0, 2) == 0 ? 4 : 1;
    for (int i = pick(1, 3); i > 0; --i) {
      const bool loop = pick(0, 2) == 0;
      clips.push_back({WindowPlan(pick(1, round % 10 == 0 ? 400 : 40), window, pick(0, window - 1), WeightShape::linear, loop,
                                  halo, multiple),
                       pick(1, 7)});
    }
    walk(clips, pick(1, 9), random);
  }
  CHECK(evaluations_to_first_frame(1000, 8, 1) == 36);
  CHECK(evaluations_to_first_frame(1000, 8, 16) == 128);
  CHECK(evaluations_to_first_frame(1000, 50, 1) == 50 * 51 / 2);
  for (int frames = 1; frames < 60; ++frames) unknown_length(frames, 1 + frames % 4);

  // Frames that nobody takes stop the clip instead of overrunning its ring.
  Wavefront wavefront;
  const std::int64_t id = wavefront.add_clip(WindowPlan(10000, 8, 2), 4, 1);
  std::vector<Task> tasks;
  std::vector<FreshFrame> fresh;
  Completion completion;
  for (wavefront.next(1, tasks, fresh); !tasks.empty(); wavefront.next(1, tasks, fresh)) wavefront.complete(tasks, completion);
  CHECK(wavefront.final_end(id) > 0 && wavefront.final_end(id) <= wavefront.sizes(id).slots());
  check_throws<std::invalid_argument>([&] { wavefront.release(id, 1000); }, "1000");
  wavefront.release(id, 6);
  wavefront.next(1, tasks, fresh);
  CHECK(tasks.size() == 1);

  check_throws<std::invalid_argument>([&] { wavefront.add_clip(WindowPlan(80, 8, 2), 0, 1); }, "steps=0");
  check_throws<std::invalid_argument>([&] { wavefront.add_clip(WindowPlan(80, 8, 2), 1, 0); }, "capacity=0");
  check_throws<std::invalid_argument>([&] { wavefront.add_clip(WindowPlan(80, 9, 2), 1, 1); }, "9 frames");
  check_throws<std::invalid_argument>([&] { wavefront.remove_clip(99); }, "clip 99");
  check_throws<std::logic_error>([&] { const Task wrong{id, 5, 3}; wavefront.complete({&wrong, 1}, completion); }, "handed out");
  return 0;
}
