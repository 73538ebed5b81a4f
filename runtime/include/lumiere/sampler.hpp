// Wavefront and frame states together: fills the denoiser's input, takes its output, and hands out final frames.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <stdexcept>
#include <vector>

#include "lumiere/denoise_step.hpp"
#include "lumiere/statistics.hpp"
#include "lumiere/thread_pool.hpp"
#include "lumiere/wavefront.hpp"

namespace lumiere {

struct StepRow {
  float u, v, p, q, r, n;
};

struct ClipSettings {
  std::uint64_t seed = 0;
  std::uint32_t stage = 0;
  std::vector<StepRow> table;  // one row a step
  float init_alpha = 0.0f, init_sigma = 1.0f;
  float guidance = 1.0f;
  float clip = 1.0f;  // infinity: off
  Statistics statistics;
  bool has_initial = false;  // fresh frames come with a clean frame
};

// The denoiser's output held NaN or infinity. Nothing of the batch has been used.
class NonFiniteOutput : public std::runtime_error {
 public:
  explicit NonFiniteOutput(const Task& task, std::uint32_t stage);
  Task task;
  std::uint32_t stage;
};

// Clips that share batches: one frame size, one length of call, one number of outputs (2 with guidance).
//
// Memory of a clip, in bytes: frame_bytes * (slots * (1 or 2: multistep samplers keep x0) + rows * num_outputs) with
// BufferSizes' slots and rows and frame_bytes = 4 * frame_values (kept rows: the output's own element size).
//
// Not for several threads at once.
class Sampler {
 public:
  Sampler(std::int64_t frame_values, int num_outputs, int num_threads, const InnerLoops* loops = nullptr);

  std::int64_t add_clip(const WindowPlan& plan, ClipSettings settings, int capacity);
  void remove_clip(std::int64_t clip);
  void set_paused(std::int64_t clip, bool paused) { wavefront_.set_paused(clip, paused); }
  void extend(std::int64_t clip, std::int64_t available, bool ended) { wavefront_.extend(clip, available, ended); }

  // Chooses the next batch: at most `capacity` tasks, none if no clip can go on. The batch stays current until
  // `complete` or `abandon`. Fresh frames of clips with an initial clip must be given by `fill_initial` before `gather`.
  std::span<const Task> next(int capacity);
  std::span<const FreshFrame> fresh() const { return fresh_; }
  void fill_initial(std::span<const FreshFrame> fresh, const float* clean);  // clean: [fresh, frame_values]
  void gather(float* x);  // [tasks, call_frames, frame_values]

  // `out`: [num_outputs, tasks_in_out, call_frames, frame_values], the current batch's tasks first. Throws
  // NonFiniteOutput before anything is changed; the batch then stays current.
  void complete(const void* out, ElementType type, std::int64_t tasks_in_out);
  // Forgets the current batch of clips that were removed; other clips' tasks cannot be abandoned.
  void abandon();

  // Copies up to `max_frames` final frames, in order, to `out` and frees their slots. Returns how many.
  std::int64_t take_final(std::int64_t clip, std::int64_t max_frames, float* out);

  const Wavefront& wavefront() const { return wavefront_; }
  std::int64_t clip_bytes(std::int64_t clip) const;
  std::int64_t frame_values() const { return frame_values_; }
  int num_outputs() const { return num_outputs_; }
  ThreadPool& pool() { return pool_; }

 private:
  struct ClipData;
  ClipData& data(std::int64_t clip) const;

  std::int64_t frame_values_;
  int num_outputs_;
  ThreadPool pool_;
  const InnerLoops& loops_;
  Wavefront wavefront_;
  std::map<std::int64_t, std::shared_ptr<ClipData>> clips_;
  int call_frames_ = 0;
  std::vector<Task> tasks_;
  std::vector<FreshFrame> fresh_;
  Completion completion_;
};

}  // namespace lumiere
