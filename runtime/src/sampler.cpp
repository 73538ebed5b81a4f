#include "lumiere/sampler.hpp"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <new>
#include <string>

namespace lumiere {

namespace {

// Memory that is not touched before it is used, so that pages of unused slots are never mapped.
struct Buffer {
  explicit Buffer(std::int64_t size)
      : bytes(size), data(static_cast<char*>(::operator new(static_cast<std::size_t>(std::max<std::int64_t>(size, 1)),
                                                            std::align_val_t{64}))) {}
  ~Buffer() { ::operator delete(data, std::align_val_t{64}); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  std::int64_t bytes;
  char* data;
};

}  // namespace

NonFiniteOutput::NonFiniteOutput(const Task& task_, std::uint32_t stage_)
    : std::runtime_error("the denoiser's output is not finite (NaN or infinity): stage " + std::to_string(stage_) +
                         ", step " + std::to_string(task_.step) + ", window " + std::to_string(task_.window)),
      task(task_), stage(stage_) {}

struct Sampler::ClipData {
  ClipSettings settings;
  Buffer state;
  std::unique_ptr<Buffer> x0;    // multistep samplers only
  std::unique_ptr<Buffer> rows;  // [num_outputs, rows, frame_values]; made with the first output's element type
  ElementType type = ElementType::float32;
  BufferSizes sizes;

  ClipData(ClipSettings settings_, BufferSizes sizes_, std::int64_t frame_values, bool multistep)
      : settings(std::move(settings_)), state(sizes_.slots() * frame_values * 4), sizes(sizes_) {
    if (multistep) x0 = std::make_unique<Buffer>(sizes.slots() * frame_values * 4);
  }

  float* slot(int slot, std::int64_t frame_values) const {
    return reinterpret_cast<float*>(state.data) + slot * frame_values;
  }
};

Sampler::Sampler(std::int64_t frame_values, int num_outputs, int num_threads, const InnerLoops* loops)
    : frame_values_(frame_values), num_outputs_(num_outputs), pool_(num_threads),
      loops_(loops != nullptr ? *loops : inner_loops()) {
  if (frame_values < 1) throw std::invalid_argument("a frame of " + std::to_string(frame_values) + " values is empty");
  if (num_outputs != 1 && num_outputs != 2) {
    throw std::invalid_argument("num_outputs=" + std::to_string(num_outputs) + " is not 1 or 2");
  }
}

Sampler::ClipData& Sampler::data(std::int64_t clip) const {
  const auto found = clips_.find(clip);
  if (found == clips_.end()) throw std::invalid_argument("clip " + std::to_string(clip) + " is unknown or was removed");
  return *found->second;
}

std::int64_t Sampler::add_clip(const WindowPlan& plan, ClipSettings settings, int capacity) {
  if (settings.table.empty()) throw std::invalid_argument("the sampler table has no steps");
  if (settings.statistics.percentile < 0.0 || settings.statistics.percentile > 1.0) {
    throw std::invalid_argument("threshold=" + std::to_string(settings.statistics.percentile) + " is not in 0..1");
  }
  if (settings.statistics.percentile > 0.0 && !(settings.clip > 0.0f && settings.clip < 1e30f)) {
    throw std::invalid_argument("dynamic thresholding needs a finite clip above 0");
  }
  const int steps = static_cast<int>(settings.table.size());
  const bool multistep = std::any_of(settings.table.begin(), settings.table.end(), [](const StepRow& row) { return row.r != 0.0f; });
  const std::int64_t id = wavefront_.add_clip(plan, steps, capacity);
  try {
    clips_[id] = std::make_shared<ClipData>(std::move(settings), wavefront_.sizes(id), frame_values_, multistep);
  } catch (...) {
    wavefront_.remove_clip(id);
    throw;
  }
  call_frames_ = plan.call_frames();
  return id;
}

void Sampler::remove_clip(std::int64_t clip) {
  data(clip);
  wavefront_.remove_clip(clip);
  clips_.erase(clip);
}

std::span<const Task> Sampler::next(int capacity) {
  if (!tasks_.empty()) throw std::logic_error("the batch before has not been completed");
  if (capacity < 1) throw std::invalid_argument("capacity=" + std::to_string(capacity) + " is less than 1");
  wavefront_.next(capacity, tasks_, fresh_);
  std::erase_if(fresh_, [this](const FreshFrame& f) {
    if (data(f.clip).settings.has_initial) return false;
    fill_initial({&f, 1}, nullptr);
    return true;
  });
  return tasks_;
}

void Sampler::fill_initial(std::span<const FreshFrame> fresh, const float* clean) {
  constexpr std::int64_t kPart = 1 << 15;
  const std::int64_t parts = (frame_values_ + kPart - 1) / kPart;
  pool_.for_each(std::ssize(fresh) * parts, [&](std::int64_t i) {
    const FreshFrame& f = fresh[static_cast<std::size_t>(i / parts)];
    const ClipData& clip = data(f.clip);
    const std::int64_t offset = i % parts * kPart;
    const NoiseKey key{clip.settings.seed, clip.settings.stage, -1, f.frame};
    loops_.initial(key, clean == nullptr ? nullptr : clean + (i / parts) * frame_values_ + offset,
                   clip.settings.init_alpha, clip.settings.init_sigma, offset, std::min(kPart, frame_values_ - offset),
                   clip.slot(f.slot, frame_values_) + offset);
  });
}

void Sampler::gather(float* x) {
  const std::int64_t rows = std::ssize(tasks_) * call_frames_;
  pool_.for_each(rows, [&](std::int64_t row) {
    const Task& task = tasks_[static_cast<std::size_t>(row / call_frames_)];
    float* to = x + row * frame_values_;
    const auto found = clips_.find(task.clip);
    if (found == clips_.end()) {
      std::memset(to, 0, static_cast<std::size_t>(frame_values_) * sizeof(float));
      return;
    }
    const std::int64_t frame = wavefront_.plan(task.clip).frame_at(task.window, static_cast<int>(row % call_frames_));
    std::memcpy(to, found->second->slot(wavefront_.slot(task.clip, frame), frame_values_),
                static_cast<std::size_t>(frame_values_) * sizeof(float));
  });
}

void Sampler::complete(const void* out, ElementType type, std::int64_t tasks_in_out) {
  const auto count = std::ssize(tasks_);
  if (tasks_in_out < count) {
    throw std::invalid_argument("the output holds " + std::to_string(tasks_in_out) + " windows, the batch has " + std::to_string(count));
  }
  const std::int64_t row_bytes = frame_values_ * element_bytes(type);
  const std::int64_t output_bytes = tasks_in_out * call_frames_ * row_bytes;
  const char* base = static_cast<const char*>(out);

  // Every frame that a window writes is looked at before any state changes.
  std::vector<std::atomic<bool>> flags(static_cast<std::size_t>(count));
  const int window_rows = call_frames_ * num_outputs_;
  pool_.for_each(count * window_rows, [&](std::int64_t i) {
    const std::int64_t task_index = i / window_rows;
    const Task& task = tasks_[static_cast<std::size_t>(task_index)];
    if (!clips_.contains(task.clip)) return;
    const WindowPlan& plan = wavefront_.plan(task.clip);
    const int position = static_cast<int>(i % call_frames_);
    const std::int64_t output = i % window_rows / call_frames_;
    // Context and padding are not used, so they are not judged either.
    if (position < plan.halo() || position >= plan.halo() + plan.window()) return;
    if (!plan.loop() && plan.has_length() && position - plan.halo() >= plan.num_frames()) return;
    const char* row = base + output * output_bytes + (task_index * call_frames_ + position) * row_bytes;
    if (!loops_.all_finite(row, type, frame_values_)) flags[static_cast<std::size_t>(task_index)] = true;
  });
  for (std::size_t i = 0; i < tasks_.size(); ++i) {
    if (flags[i]) throw NonFiniteOutput(tasks_[i], data(tasks_[i].clip).settings.stage);
  }

  for (const Task& task : tasks_) {
    const auto found = clips_.find(task.clip);
    if (found == clips_.end()) continue;
    ClipData& clip = *found->second;
    if (!clip.rows) {
      clip.rows = std::make_unique<Buffer>(clip.sizes.rows * num_outputs_ * row_bytes);
      clip.type = type;
    } else if (clip.type != type) {
      throw std::invalid_argument("the output's element type changed between calls");
    }
  }

  wavefront_.complete(tasks_, completion_);
  const auto row_at = [&](const ClipData& clip, int row, int output) -> const void* {
    if (row < 0) return base + output * output_bytes + static_cast<std::int64_t>(-1 - row) * row_bytes;
    return clip.rows->data + (output * clip.sizes.rows + row) * row_bytes;
  };

  std::vector<Output> outputs(completion_.sources.size());
  std::vector<StepPart> parts;
  parts.reserve(completion_.steps.size());
  bool statistics = false;
  for (const FrameStep& step : completion_.steps) {
    const ClipData& clip = data(step.clip);
    const ClipSettings& settings = clip.settings;
    for (int k = 0; k < step.num_sources; ++k) {
      const Source& source = completion_.sources[static_cast<std::size_t>(step.first_source + k)];
      outputs[static_cast<std::size_t>(step.first_source + k)] = {
          row_at(clip, source.row, 0), num_outputs_ == 2 ? row_at(clip, source.row, 1) : nullptr, source.weight};
    }
    const StepRow& row = settings.table[static_cast<std::size_t>(step.step)];
    float* state = clip.slot(step.slot, frame_values_);
    float* x0 = clip.x0 ? reinterpret_cast<float*>(clip.x0->data) + step.slot * frame_values_ : nullptr;
    parts.push_back({state, step.step > 0 ? x0 : nullptr, state, x0,
                     outputs.data() + step.first_source, step.num_sources, type,
                     {row.u, row.v, row.p, row.q, row.r, row.n, settings.guidance, 1.0f, settings.clip, 1.0f},
                     {settings.seed, settings.stage, step.step, step.frame}, 0, frame_values_});
    statistics = statistics || settings.statistics.percentile > 0.0 || settings.statistics.rescale != 0.0f;
  }
  if (statistics) {
    pool_.for_each(std::ssize(parts), [&](std::int64_t i) {
      std::vector<float> scratch;
      const auto index = static_cast<std::size_t>(i);
      apply_statistics(data(completion_.steps[index].clip).settings.statistics, loops_, parts[index], scratch);
    });
  }
  denoise_frames(parts, pool_, loops_);

  pool_.for_each(std::ssize(completion_.kept), [&](std::int64_t i) {
    const KeptRow& kept = completion_.kept[static_cast<std::size_t>(i)];
    const ClipData& clip = data(kept.clip);
    for (int output = 0; output < num_outputs_; ++output) {
      std::memcpy(clip.rows->data + (output * clip.sizes.rows + kept.kept_row) * row_bytes,
                  base + output * output_bytes + kept.call_row * row_bytes, static_cast<std::size_t>(row_bytes));
    }
  });
  tasks_.clear();
}

void Sampler::abandon() {
  for (const Task& task : tasks_) {
    if (clips_.contains(task.clip)) {
      throw std::logic_error("clip " + std::to_string(task.clip) + " has a task in the batch; remove it first");
    }
  }
  tasks_.clear();
}

std::int64_t Sampler::take_final(std::int64_t clip, std::int64_t max_frames, float* out) {
  const ClipData& c = data(clip);
  const std::int64_t first = wavefront_.released(clip);
  const std::int64_t count = std::min(max_frames, wavefront_.final_end(clip) - first);
  pool_.for_each(count, [&](std::int64_t i) {
    std::memcpy(out + i * frame_values_, c.slot(wavefront_.slot(clip, first + i), frame_values_),
                static_cast<std::size_t>(frame_values_) * sizeof(float));
  });
  wavefront_.release(clip, count);
  return count;
}

std::int64_t Sampler::clip_bytes(std::int64_t clip) const {
  const ClipData& c = data(clip);
  return c.state.bytes + (c.x0 ? c.x0->bytes : 0) + c.sizes.rows * num_outputs_ * frame_values_ * element_bytes(c.type);
}

}  // namespace lumiere
