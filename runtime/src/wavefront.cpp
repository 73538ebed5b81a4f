#include "lumiere/wavefront.hpp"

#include <algorithm>
#include <cassert>
#include <limits>
#include <queue>
#include <stdexcept>
#include <string>

namespace lumiere {

namespace {

constexpr std::int64_t kUnknown = std::numeric_limits<std::int64_t>::max();
constexpr int kNoRow = std::numeric_limits<int>::max();

// Rows that the frames of one clip can have kept at once, each frame at its worst.
std::int64_t kept_rows(const WindowPlan& plan, std::int64_t slots) {
  std::vector<std::int64_t> writers, readers;
  const auto rows_of = [&](std::int64_t frame) {
    plan.writers(frame, writers);
    plan.readers(frame, readers);
    const auto w = static_cast<std::int64_t>(writers.size());
    return readers.size() > writers.size() ? w : w - 1;
  };
  if (plan.has_length() && plan.num_frames() <= slots) {
    std::int64_t rows = 0;
    for (std::int64_t f = 0; f < plan.num_frames(); ++f) rows += rows_of(f);
    return rows;
  }
  // Any run of `slots` frames: whole periods of the regular windows, and the moved last window on top.
  WindowPlan regular(std::nullopt, plan.window(), plan.overlap(), plan.weights(), false, plan.halo(), 1);
  std::int64_t period = 0;
  const std::int64_t far = static_cast<std::int64_t>(plan.call_frames() + plan.halo()) * plan.stride();
  for (std::int64_t f = far; f < far + plan.stride(); ++f) {
    regular.writers(f, writers);
    const bool context = plan.call_frames() > plan.window();
    period += static_cast<std::int64_t>(writers.size()) - (context ? 0 : 1);
  }
  return period * (slots / plan.stride() + 2) + 2 * plan.call_frames();
}

// Windows at a loop's end that the first frame depends on.
std::int64_t left_windows(const WindowPlan& plan, int steps) {
  return std::min<std::int64_t>(plan.num_windows() - 1, static_cast<std::int64_t>(plan.reach()) * steps + 1);
}

}  // namespace

BufferSizes buffer_sizes(const WindowPlan& plan, int steps, int capacity) {
  const std::int64_t reach = plan.reach();
  const std::int64_t lead = std::max<std::int64_t>(1, reach) * capacity;
  const std::int64_t stride = plan.stride();
  BufferSizes sizes{plan.call_frames() + stride * (reach * (steps - 1) + lead), 0, 0};
  if (plan.loop()) {
    const std::int64_t n = plan.num_windows();
    sizes.seam = plan.halo() + plan.num_frames() - (n - left_windows(plan, steps)) * stride;
  }
  if (plan.has_length() && plan.num_frames() <= sizes.slots()) sizes = {plan.num_frames(), 0, 0};
  sizes.rows = kept_rows(plan, sizes.slots());
  return sizes;
}

// Windows are walked by key: the window's index, less the number of windows for those at a loop's end that the first
// frames depend on. Frames are walked the same way ("unrolled"): those before 0 are a loop's last ones.
struct Wavefront::Clip {
  struct Window {
    int done = 0;     // steps completed
    int missing = 0;  // frames it reads that have not reached step `done`
    int reads = 0;
  };
  struct Frame {
    std::int64_t frame = -1;
    int version = 0;  // steps made
    int seen = 0;     // readers that have run at this version
    int num_readers = 0;
    int num_writers = 0;
  };

  std::int64_t id;
  WindowPlan plan;
  int steps;
  BufferSizes sizes;
  bool whole;  // one slot a frame
  bool paused = false;
  std::int64_t settled, available;
  std::int64_t first_key = 0, next_key = 0, oldest_key = 0, end_key = kUnknown;
  std::int64_t first_fresh = 0, next_fresh = 0;  // unrolled
  std::int64_t released = 0, final_end = 0;
  int max_readers, max_writers;
  std::vector<Window> windows;
  std::vector<Frame> frames;           // by slot
  std::vector<std::int64_t> readers;   // [slots, max_readers]
  std::vector<std::int64_t> writers;   // [slots, max_writers]
  std::vector<Source> sources;         // [slots, max_writers]
  std::vector<int> free_rows;
  std::priority_queue<std::int64_t, std::vector<std::int64_t>, std::greater<>> ready;
  std::vector<std::int64_t> scratch;
  std::vector<float> scratch_weights;

  Clip(std::int64_t id_, const WindowPlan& plan_, int steps_, int capacity)
      : id(id_), plan(plan_), steps(steps_), sizes(buffer_sizes(plan_, steps_, capacity)),
        whole(plan_.has_length() && plan_.num_frames() <= sizes.slots()),
        settled(plan_.has_length() ? plan_.num_frames() : 0), available(settled) {
    max_writers = plan.max_writers();
    max_readers = plan.call_frames() / plan.stride() + 3;
    std::int64_t num_states = sizes.slots() / plan.stride() + 4;
    if (plan.has_length()) {
      const std::int64_t n = plan.num_windows();
      if (plan.loop()) {
        first_key = -left_windows(plan, steps);
        num_states = n;
        first_fresh = (n + first_key) * plan.stride() - plan.num_frames() - plan.halo();
        if (first_key == 0) first_fresh = -plan.halo();
      }
      end_key = n + first_key;
      num_states = std::min(num_states, n);
    }
    next_key = oldest_key = first_key;
    next_fresh = first_fresh;
    windows.resize(static_cast<std::size_t>(num_states));
    const auto slots = static_cast<std::size_t>(sizes.slots());
    frames.resize(slots);
    readers.resize(slots * max_readers);
    writers.resize(slots * max_writers);
    sources.resize(slots * max_writers);
    free_rows.reserve(static_cast<std::size_t>(sizes.rows));
    for (std::int64_t row = sizes.rows; row-- > 0;) free_rows.push_back(static_cast<int>(row));
  }

  std::int64_t window_of(std::int64_t key) const { return key < 0 ? key + plan.num_windows() : key; }
  std::int64_t key_of(std::int64_t window) const { return window >= end_key ? window - plan.num_windows() : window; }
  Window& state(std::int64_t window) { return windows[static_cast<std::size_t>(window) % windows.size()]; }

  int slot_of(std::int64_t frame) const {
    if (whole) return static_cast<int>(frame);
    if (sizes.seam > 0 && frame >= plan.num_frames() - sizes.seam) {
      return static_cast<int>(sizes.frames + frame - (plan.num_frames() - sizes.seam));
    }
    return static_cast<int>(frame % sizes.frames);
  }

  // One past the last frame (unrolled) that the window reads.
  std::int64_t read_end(std::int64_t key) const {
    const std::int64_t window = window_of(key);
    if (!plan.loop()) return plan.frame_at(window, plan.call_frames() - 1) + 1;
    const std::int64_t start = plan.start(window) - (key < 0 ? plan.num_frames() : 0);
    return start - plan.halo() + plan.call_frames();
  }

  bool can_start(std::int64_t key) const {
    if (key >= end_key) return false;
    std::int64_t end = read_end(key);
    if (end > settled && !plan.loop()) return false;
    if (whole) return true;
    if (plan.loop()) end = std::min(end, plan.num_frames() - sizes.seam);
    return end <= released + sizes.frames;
  }

  void start_window(std::int64_t key, std::vector<FreshFrame>& fresh) {
    const std::int64_t window = window_of(key);
    std::int64_t end = read_end(key);
    if (plan.loop()) end = std::min(end, first_fresh + plan.num_frames());
    for (; next_fresh < end; ++next_fresh) {
      std::int64_t frame = next_fresh;
      if (plan.loop()) frame = ((frame % plan.num_frames()) + plan.num_frames()) % plan.num_frames();
      fresh.push_back({id, frame, open_frame(frame)});
    }
    Window& w = state(window);
    assert(w.missing == 0);
    plan.frames_read(window, scratch);
    w = {0, 0, static_cast<int>(scratch.size())};
  }

  int open_frame(std::int64_t frame) {
    const int slot = slot_of(frame);
    Frame& f = frames[slot];
    if (f.frame >= 0) throw std::logic_error("frame ring overrun: slot of frame " + std::to_string(frame) + " is in use");
    f = {frame, 0, 0, 0, 0};
    plan.readers(frame, scratch);
    f.num_readers = static_cast<int>(scratch.size());
    assert(f.num_readers <= max_readers);
    std::copy(scratch.begin(), scratch.end(), readers.begin() + static_cast<std::ptrdiff_t>(slot) * max_readers);
    plan.writers(frame, scratch);
    f.num_writers = static_cast<int>(scratch.size());
    assert(f.num_writers <= max_writers);
    std::copy(scratch.begin(), scratch.end(), writers.begin() + static_cast<std::ptrdiff_t>(slot) * max_writers);
    plan.frame_weights(frame, scratch, scratch_weights);
    for (int k = 0; k < f.num_writers; ++k) {
      sources[static_cast<std::size_t>(slot) * max_writers + k] = {kNoRow, scratch_weights[k]};
    }
    return slot;
  }

  bool take(std::vector<Task>& tasks, std::vector<FreshFrame>& fresh) {
    if (paused) return false;
    std::int64_t key;
    if (!ready.empty()) {
      key = ready.top();
      ready.pop();
    } else if (can_start(next_key)) {
      key = next_key++;
      start_window(key, fresh);
    } else {
      return false;
    }
    const std::int64_t window = window_of(key);
    tasks.push_back({id, window, state(window).done});
    return true;
  }

  // The task's outputs are there: note where, and which frames have now been read by all.
  void finish_task(const Task& task, int first_row, std::vector<std::pair<Clip*, int>>& stepped) {
    Window& w = state(task.window);
    if (w.done != task.step || w.missing != 0) throw std::logic_error("a task was completed that was not handed out");
    ++w.done;
    w.missing = w.reads;
    plan.frames_read(task.window, scratch);
    for (const std::int64_t frame : scratch) {
      const int slot = slot_of(frame);
      Frame& f = frames[slot];
      assert(f.frame == frame && f.version == task.step);
      const std::size_t base = static_cast<std::size_t>(slot) * max_writers;
      for (int k = 0; k < f.num_writers; ++k) {
        if (writers[base + k] == task.window) {
          sources[base + k].row = -1 - (first_row + plan.written_position(task.window, frame));
        }
      }
      if (++f.seen == f.num_readers) stepped.emplace_back(this, slot);
    }
    while (oldest_key < next_key && state(window_of(oldest_key)).done == steps) ++oldest_key;
  }

  void step_frame(int slot, Completion& completion) {
    Frame& f = frames[slot];
    const std::size_t base = static_cast<std::size_t>(slot) * max_writers;
    completion.steps.push_back(
        {id, f.frame, f.version, slot, static_cast<int>(completion.sources.size()), f.num_writers});
    for (int k = 0; k < f.num_writers; ++k) {
      Source& source = sources[base + k];
      assert(source.row != kNoRow);
      completion.sources.push_back(source);
      if (source.row >= 0) free_rows.push_back(source.row);
      source.row = kNoRow;
    }
    ++f.version;
    f.seen = 0;
    for (int k = 0; k < f.num_readers; ++k) {
      const std::int64_t window = readers[static_cast<std::size_t>(slot) * max_readers + k];
      Window& w = state(window);
      if (--w.missing == 0 && w.done < steps) ready.push(key_of(window));
    }
    if (f.version == steps) {
      while (final_end < settled) {
        const Frame& next = frames[slot_of(final_end)];
        if (next.frame != final_end || next.version != steps) break;
        ++final_end;
      }
    }
  }

  // Rows of this call that a later step needs are given a place.
  void keep_rows(const Task& task, Completion& completion) {
    plan.frames_read(task.window, scratch);
    for (const std::int64_t frame : scratch) {
      const int slot = slot_of(frame);
      const Frame& f = frames[slot];
      if (f.frame != frame) continue;
      const std::size_t base = static_cast<std::size_t>(slot) * max_writers;
      for (int k = 0; k < f.num_writers; ++k) {
        Source& source = sources[base + k];
        if (writers[base + k] != task.window || source.row == kNoRow || source.row >= 0) continue;
        if (free_rows.empty()) throw std::logic_error("kept rows overrun: the bound of BufferSizes::rows is too small");
        const int row = free_rows.back();
        free_rows.pop_back();
        completion.kept.push_back({id, -1 - source.row, row});
        source.row = row;
      }
    }
  }
};

Wavefront::Wavefront() = default;
Wavefront::~Wavefront() = default;
Wavefront::Wavefront(Wavefront&&) noexcept = default;
Wavefront& Wavefront::operator=(Wavefront&&) noexcept = default;

Wavefront::Clip* Wavefront::find_or_null(std::int64_t clip) const {
  for (const auto& c : clips_) {
    if (c->id == clip) return c.get();
  }
  return nullptr;
}

Wavefront::Clip& Wavefront::find(std::int64_t clip) const {
  if (Clip* found = find_or_null(clip)) return *found;
  throw std::invalid_argument("clip " + std::to_string(clip) + " is unknown or was removed");
}

std::int64_t Wavefront::add_clip(const WindowPlan& plan, int steps, int capacity) {
  if (steps < 1) throw std::invalid_argument("steps=" + std::to_string(steps) + " is less than 1");
  if (capacity < 1) throw std::invalid_argument("capacity=" + std::to_string(capacity) + " is less than 1");
  if (call_frames_ == 0) call_frames_ = plan.call_frames();
  if (call_frames_ != plan.call_frames()) {
    throw std::invalid_argument("the clip's calls have " + std::to_string(plan.call_frames()) +
                                " frames, those of the clips it would share batches with have " +
                                std::to_string(call_frames_));
  }
  clips_.push_back(std::make_unique<Clip>(next_id_, plan, steps, capacity));
  return next_id_++;
}

void Wavefront::remove_clip(std::int64_t clip) {
  find(clip);
  std::erase_if(clips_, [clip](const auto& c) { return c->id == clip; });
}

void Wavefront::set_paused(std::int64_t clip, bool paused) { find(clip).paused = paused; }

void Wavefront::extend(std::int64_t clip, std::int64_t available, bool ended) {
  Clip& c = find(clip);
  if (c.plan.has_length()) throw std::invalid_argument("the clip's length is already known");
  if (available < c.available) {
    throw std::invalid_argument("available=" + std::to_string(available) + " is less than the " +
                                std::to_string(c.available) + " frames reported before");
  }
  if (ended) {
    c.plan.set_num_frames(available);
    c.end_key = c.plan.num_windows();
  }
  c.available = available;
  c.settled = c.plan.settled_frames(available);
}

void Wavefront::next(int capacity, std::vector<Task>& tasks, std::vector<FreshFrame>& fresh) {
  tasks.clear();
  fresh.clear();
  std::size_t idle = 0;
  while (static_cast<int>(tasks.size()) < capacity && idle < clips_.size()) {
    turn_ = turn_ % clips_.size();
    idle = clips_[turn_]->take(tasks, fresh) ? 0 : idle + 1;
    ++turn_;
  }
}

void Wavefront::complete(std::span<const Task> tasks, Completion& completion) {
  completion.clear();
  stepped_.clear();
  for (std::size_t i = 0; i < tasks.size(); ++i) {
    Clip* clip = find_or_null(tasks[i].clip);
    if (clip != nullptr) clip->finish_task(tasks[i], static_cast<int>(i) * call_frames_, stepped_);
  }
  for (const auto& [clip, slot] : stepped_) clip->step_frame(slot, completion);
  for (const Task& task : tasks) {
    Clip* clip = find_or_null(task.clip);
    if (clip != nullptr) clip->keep_rows(task, completion);
  }
}

std::int64_t Wavefront::released(std::int64_t clip) const { return find(clip).released; }
std::int64_t Wavefront::final_end(std::int64_t clip) const { return find(clip).final_end; }

void Wavefront::release(std::int64_t clip, std::int64_t count) {
  Clip& c = find(clip);
  if (count < 0 || c.released + count > c.final_end) {
    throw std::invalid_argument("cannot release " + std::to_string(count) + " frames: " +
                                std::to_string(c.final_end - c.released) + " are final");
  }
  for (; count > 0; --count, ++c.released) c.frames[c.slot_of(c.released)].frame = -1;
}

int Wavefront::slot(std::int64_t clip, std::int64_t frame) const { return find(clip).slot_of(frame); }
const WindowPlan& Wavefront::plan(std::int64_t clip) const { return find(clip).plan; }
BufferSizes Wavefront::sizes(std::int64_t clip) const { return find(clip).sizes; }

bool Wavefront::is_finished(std::int64_t clip) const {
  const Clip& c = find(clip);
  return c.plan.has_length() && c.final_end == c.plan.num_frames();
}

std::int64_t Wavefront::first_needed(std::int64_t clip) const {
  const Clip& c = find(clip);
  if (c.plan.has_length() && c.oldest_key >= c.end_key) return c.plan.num_frames();
  if (c.plan.loop()) return 0;
  return c.plan.frame_at(c.oldest_key, 0);
}

std::int64_t Wavefront::frames_wanted(std::int64_t clip, int capacity) const {
  const Clip& c = find(clip);
  if (c.plan.has_length() || static_cast<int>(c.ready.size()) >= capacity) return 0;
  const std::int64_t end = c.read_end(c.next_key);
  if (end <= c.settled || end > c.released + c.sizes.frames) return 0;
  return end + c.plan.window() + c.plan.halo();
}

}  // namespace lumiere
