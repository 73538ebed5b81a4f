#include "lumiere/window_plan.hpp"

#include <algorithm>
#include <cmath>
#include <stdexcept>

namespace lumiere {

namespace {

void require(bool condition, const std::string& text) {
  if (!condition) throw std::invalid_argument(text);
}

std::int64_t floor_div(std::int64_t a, std::int64_t b) { return a / b - (a % b != 0 && (a < 0) != (b < 0)); }
std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return -floor_div(-a, b); }
std::int64_t wrap(std::int64_t a, std::int64_t b) { return a - floor_div(a, b) * b; }

}  // namespace

WeightShape weight_shape_from_name(const std::string& name) {
  if (name == "flat") return WeightShape::flat;
  if (name == "linear") return WeightShape::linear;
  if (name == "gaussian") return WeightShape::gaussian;
  throw std::invalid_argument("weights='" + name + "' is not one of flat, linear, gaussian");
}

WindowPlan::WindowPlan(std::optional<std::int64_t> num_frames, int window, int overlap, WeightShape weights, bool loop,
                       int halo, int multiple)
    : num_frames_(num_frames.value_or(-1)), window_(window), stride_(window - overlap), halo_(halo), loop_(loop),
      shape_(weights) {
  require(!num_frames || *num_frames >= 1, "num_frames=" + std::to_string(num_frames_) + " is less than 1");
  require(num_frames || !loop, "a loop needs the number of frames; it is unknown");
  require(window >= 1 && window <= 1 << 16, "window=" + std::to_string(window) + " is not in 1..65536");
  require(overlap >= 0 && overlap < window,
          "overlap=" + std::to_string(overlap) + " is not in 0.." + std::to_string(window - 1) + " (window - 1)");
  require(halo >= 0 && halo <= 1 << 16, "halo=" + std::to_string(halo) + " is not in 0..65536");
  require(multiple >= 1 && multiple <= 1 << 16, "multiple=" + std::to_string(multiple) + " is not in 1..65536");
  call_frames_ = static_cast<int>(ceil_div(window + 2 * halo, multiple)) * multiple;

  profile_.resize(static_cast<std::size_t>(window));
  const double centre = 0.5 * (window - 1);
  for (int i = 0; i < window; ++i) {
    const double distance = std::abs(i - centre);
    switch (weights) {
      case WeightShape::flat: profile_[i] = 1.0; break;
      case WeightShape::linear: profile_[i] = 0.5 * (window + 1) - distance; break;  // triangle, 1 at the ends' frames
      case WeightShape::gaussian: {
        const double z = distance / (0.25 * window);  // sigma is a quarter of the window
        profile_[i] = std::exp(-0.5 * z * z);
        break;
      }
    }
  }
}

std::int64_t WindowPlan::num_windows() const {
  if (!has_length()) throw std::logic_error("the number of windows is unknown until the clip's end is known");
  if (loop_) return ceil_div(num_frames_, stride_);
  return num_frames_ <= window_ ? 1 : ceil_div(num_frames_ - window_, stride_) + 1;
}

void WindowPlan::set_num_frames(std::int64_t num_frames) {
  require(num_frames >= 1, "num_frames=" + std::to_string(num_frames) + " is less than 1");
  num_frames_ = num_frames;
}

std::int64_t WindowPlan::start(std::int64_t window_index) const {
  const std::int64_t regular = window_index * stride_;
  if (loop_ || !has_length()) return regular;
  return std::min(regular, std::max<std::int64_t>(0, num_frames_ - window_));
}

std::int64_t WindowPlan::frame_at(std::int64_t window_index, int position) const {
  const std::int64_t frame = start(window_index) - halo_ + position;
  if (loop_) return wrap(frame, num_frames_);
  const std::int64_t last = has_length() ? num_frames_ - 1 : INT64_MAX;
  return std::clamp<std::int64_t>(frame, 0, last);
}

int WindowPlan::written_position(std::int64_t window_index, std::int64_t frame) const {
  std::int64_t offset = frame - start(window_index);
  if (loop_) offset = wrap(offset, num_frames_);
  return offset >= 0 && offset < window_ ? static_cast<int>(offset) + halo_ : -1;
}

// Windows whose start lies in [first_start, last_start].
void WindowPlan::covering(std::int64_t first_start, std::int64_t last_start, std::vector<std::int64_t>& out) const {
  out.clear();
  if (loop_) {
    const std::int64_t n = num_windows();
    for (std::int64_t turn = floor_div(first_start, num_frames_); turn * num_frames_ <= last_start; ++turn) {
      const std::int64_t base = turn * num_frames_;
      const std::int64_t first = std::max<std::int64_t>(0, ceil_div(first_start - base, stride_));
      const std::int64_t last = std::min(n - 1, floor_div(last_start - base, stride_));
      for (std::int64_t w = first; w <= last; ++w) out.push_back(w);
    }
    std::sort(out.begin(), out.end());
    out.erase(std::unique(out.begin(), out.end()), out.end());
    return;
  }
  const std::int64_t first = std::max<std::int64_t>(0, ceil_div(first_start, stride_));
  std::int64_t last = floor_div(last_start, stride_);
  if (!has_length()) {
    for (std::int64_t w = first; w <= last; ++w) out.push_back(w);
    return;
  }
  const std::int64_t n = num_windows();
  last = std::min(last, n - 2);
  for (std::int64_t w = first; w <= last; ++w) out.push_back(w);
  const std::int64_t final_start = start(n - 1);
  if (final_start >= first_start && final_start <= last_start) out.push_back(n - 1);
}

void WindowPlan::writers(std::int64_t frame, std::vector<std::int64_t>& out) const {
  const std::int64_t written = loop_ ? std::min<std::int64_t>(window_, num_frames_) : window_;
  covering(frame - written + 1, frame, out);
}

void WindowPlan::readers(std::int64_t frame, std::vector<std::int64_t>& out) const {
  const std::int64_t read = loop_ ? std::min<std::int64_t>(call_frames_, num_frames_) : call_frames_;
  covering(frame + halo_ - read + 1, frame + halo_, out);
}

void WindowPlan::frames_read(std::int64_t window_index, std::vector<std::int64_t>& out) const {
  out.clear();
  if (loop_) {
    const std::int64_t count = std::min<std::int64_t>(call_frames_, num_frames_);
    for (std::int64_t i = 0; i < count; ++i) out.push_back(frame_at(window_index, static_cast<int>(i)));
    return;
  }
  const std::int64_t last = frame_at(window_index, call_frames_ - 1);
  for (std::int64_t frame = frame_at(window_index, 0); frame <= last; ++frame) out.push_back(frame);
}

void WindowPlan::frame_weights(std::int64_t frame, const std::vector<std::int64_t>& writers,
                               std::vector<float>& out) const {
  out.resize(writers.size());
  double sum = 0.0;
  for (const std::int64_t w : writers) sum += profile_[written_position(w, frame) - halo_];
  for (std::size_t k = 0; k < writers.size(); ++k) {
    out[k] = static_cast<float>(profile_[written_position(writers[k], frame) - halo_] / sum);
  }
}

std::int64_t WindowPlan::settled_frames(std::int64_t available) const {
  if (has_length()) return num_frames_;
  // The last window will start at num_frames - window >= available - window, and reads from halo before that.
  return std::max<std::int64_t>(0, available - window_ - halo_);
}

int WindowPlan::max_writers() const {
  const int regular = static_cast<int>(ceil_div(window_, stride_));
  return regular + 1;  // the moved last window, or the seam of a loop, adds one
}

}  // namespace lumiere
