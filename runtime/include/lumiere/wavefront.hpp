// The order of (window, step) tasks, and which buffer holds what. Pure bookkeeping: no tensor is touched here.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "lumiere/window_plan.hpp"

namespace lumiere {

// One denoiser evaluation: `window` of `clip`, at sampler step `step`.
struct Task {
  std::int64_t clip;
  std::int64_t window;
  int step;
};

// A frame that a task of this batch is the first to read: its slot must be filled with the initial state.
struct FreshFrame {
  std::int64_t clip, frame;
  int slot;
};

// Where one covering window's output for a frame lies: a row kept from an earlier call, or a row of this call's output.
struct Source {
  int row;  // >= 0: kept row; < 0: row -1 - row of this call, counted over [tasks, call_frames]
  float weight;
};

// A frame whose readers have all run at `step`: its state goes to step + 1, in place.
struct FrameStep {
  std::int64_t clip, frame;
  int step, slot;
  int first_source, num_sources;  // in Completion::sources, ascending windows
};

// An output row that a later step needs. Copied after the steps of the same Completion, whose rows it may take over.
struct KeptRow {
  std::int64_t clip;
  int call_row, kept_row;
};

struct Completion {
  std::vector<FrameStep> steps;
  std::vector<Source> sources;
  std::vector<KeptRow> kept;
  void clear() { steps.clear(), sources.clear(), kept.clear(); }
};

// Sizes of a clip's buffers; none depends on the clip's length once that is longer than `frames`.
//
//   frames = call_frames + stride * (reach * (steps - 1) + lead),   lead = reach * capacity
//   seam  <= halo + stride * (reach * steps + 1)                    loops only: the first frames' left neighbours,
//                                                                   which wait for the clip's end
//   rows   = kept output rows: for each frame its writers, less one where the last reader is a writer
//
// reach = (call_frames - 1) / stride. A clip with fewer frames than frames + seam has one slot a frame.
struct BufferSizes {
  std::int64_t frames, seam, rows;
  std::int64_t slots() const { return frames + seam; }
};
BufferSizes buffer_sizes(const WindowPlan& plan, int steps, int capacity);

// Hands out ready tasks, oldest frames of each clip first, clips in turn. A task is ready when every frame that its
// window reads has made the steps before. A frame steps when every window that reads it has run, so one buffer a frame
// is enough and is updated in place. Deterministic: the same calls give the same order.
class Wavefront {
 public:
  Wavefront();
  ~Wavefront();
  Wavefront(Wavefront&&) noexcept;
  Wavefront& operator=(Wavefront&&) noexcept;

  // `capacity`: tasks that one batch may hold; more of it keeps more frames in flight. Returns the clip's handle.
  std::int64_t add_clip(const WindowPlan& plan, int steps, int capacity);
  void remove_clip(std::int64_t clip);
  // A paused clip keeps its buffers and is given no new tasks; those that were handed out still complete.
  void set_paused(std::int64_t clip, bool paused);

  // A clip of unknown length: frames 0 .. available-1 are there; `ended`: there will be no more.
  void extend(std::int64_t clip, std::int64_t available, bool ended);

  // Appends up to `capacity` ready tasks to `tasks` and the frames they touch first to `fresh` (both cleared first).
  void next(int capacity, std::vector<Task>& tasks, std::vector<FreshFrame>& fresh);

  // `tasks` is a batch that `next` gave, in its order. Tasks of removed clips are skipped.
  void complete(std::span<const Task> tasks, Completion& completion);

  // Final frames not yet released: [released, final_end), in order. Unreleased frames hold their slots.
  std::int64_t released(std::int64_t clip) const;
  std::int64_t final_end(std::int64_t clip) const;
  void release(std::int64_t clip, std::int64_t count);

  int slot(std::int64_t clip, std::int64_t frame) const;
  const WindowPlan& plan(std::int64_t clip) const;
  BufferSizes sizes(std::int64_t clip) const;
  bool is_finished(std::int64_t clip) const;  // all frames final (released or not)

  // No window that is still to run reads a frame below this one.
  std::int64_t first_needed(std::int64_t clip) const;
  // Frames that must be there before the next window can start; 0 while something else holds it back, or while
  // `capacity` tasks are ready without it.
  std::int64_t frames_wanted(std::int64_t clip, int capacity) const;

 private:
  struct Clip;
  Clip* find_or_null(std::int64_t clip) const;
  Clip& find(std::int64_t clip) const;

  std::vector<std::unique_ptr<Clip>> clips_;
  std::int64_t next_id_ = 0;
  std::size_t turn_ = 0;
  int call_frames_ = 0;  // of every clip
  std::vector<std::pair<Clip*, int>> stepped_;  // scratch of complete: clip, slot
};

}  // namespace lumiere
