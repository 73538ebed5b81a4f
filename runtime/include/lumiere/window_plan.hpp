// Temporal windows: which frames each denoiser call reads, which it writes, and with what weight. Pure arithmetic.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace lumiere {

enum class WeightShape { flat, linear, gaussian };

WeightShape weight_shape_from_name(const std::string& name);  // throws std::invalid_argument

// Windows start at 0, stride, 2 * stride, ... with stride = window - overlap. In an open clip the last one is moved
// back so that it ends with the clip; in a loop windows wrap round the end, and so many are made that the seam is
// overlapped like any other place.
//
// A call reads `call_frames` frames: the window, `halo` more on each side, and as many more at the end as make the
// number a multiple of `multiple` (the network's temporal factor). Position i of window w reads frame
// start(w) - halo + i, held to the clip's first and last frame, or wrapped in a loop. Every call has this one length,
// also for a clip shorter than the window. Of what a call returns, only the window's own frames are used.
class WindowPlan {
 public:
  // Throws std::invalid_argument, naming the value, unless 1 <= window, 0 <= overlap < window, 0 <= halo,
  // 1 <= multiple and num_frames >= 1. A clip of unknown length has no num_frames; it cannot be a loop.
  WindowPlan(std::optional<std::int64_t> num_frames, int window, int overlap, WeightShape weights = WeightShape::flat,
             bool loop = false, int halo = 0, int multiple = 1);

  bool has_length() const { return num_frames_ >= 0; }
  std::int64_t num_frames() const { return num_frames_; }  // -1: unknown
  std::int64_t num_windows() const;                        // throws std::logic_error while the length is unknown
  int window() const { return window_; }
  int overlap() const { return window_ - stride_; }
  int stride() const { return stride_; }
  int halo() const { return halo_; }
  int call_frames() const { return call_frames_; }
  bool loop() const { return loop_; }
  WeightShape weights() const { return shape_; }

  void set_num_frames(std::int64_t num_frames);  // the end of a clip of unknown length

  std::int64_t start(std::int64_t window_index) const;
  std::int64_t frame_at(std::int64_t window_index, int position) const;

  // The position in the call at which a window writes `frame`, or -1.
  int written_position(std::int64_t window_index, std::int64_t frame) const;

  // Windows that write, or that read, a frame; ascending. `out` is cleared first.
  void writers(std::int64_t frame, std::vector<std::int64_t>& out) const;
  void readers(std::int64_t frame, std::vector<std::int64_t>& out) const;

  // The frames that a window reads, each once.
  void frames_read(std::int64_t window_index, std::vector<std::int64_t>& out) const;

  // Weights of the writers of `frame`, in their order; they sum to one (in double; each is then rounded to fp32).
  void frame_weights(std::int64_t frame, const std::vector<std::int64_t>& writers, std::vector<float>& out) const;

  // Frames of a clip of unknown length whose readers no later frame can change, once `available` frames are there.
  std::int64_t settled_frames(std::int64_t available) const;

  // Most windows that write one frame.
  int max_writers() const;

  // Windows further apart than this share no frame.
  int reach() const { return (call_frames_ - 1) / stride_; }

 private:
  void covering(std::int64_t first_start, std::int64_t last_start, std::vector<std::int64_t>& out) const;

  std::int64_t num_frames_;
  int window_, stride_, halo_, call_frames_;
  bool loop_;
  WeightShape shape_;
  std::vector<double> profile_;  // weight by position in the window, before normalisation
};

}  // namespace lumiere
