#include "lumiere/statistics.hpp"

#include <algorithm>
#include <cmath>

namespace lumiere {

namespace {

double quantile(std::vector<float>& values, std::int64_t count, double q) {
  const double place = q * static_cast<double>(count - 1);
  const auto low = static_cast<std::int64_t>(std::floor(place));
  const auto first = values.begin();
  std::nth_element(first, first + low, first + count);
  const double below = values[low];
  if (low + 1 >= count) return below;
  const double above = *std::min_element(first + low + 1, first + count);
  return below + (above - below) * (place - static_cast<double>(low));
}

}  // namespace

void apply_statistics(const Statistics& statistics, const InnerLoops& loops, StepPart& frame,
                      std::vector<float>& scratch) {
  const bool rescale = statistics.rescale != 0.0f && frame.outputs[0].uncond != nullptr;
  if (!rescale && statistics.percentile == 0.0) return;
  const std::int64_t count = frame.count;
  scratch.resize(static_cast<std::size_t>(count));
  float* average = scratch.data();
  Sums sums{};
  loops.average(frame, average, rescale ? &sums : nullptr);
  if (rescale) {
    const double n = static_cast<double>(count);
    const double cond_mean = sums.cond / n, guided_mean = sums.guided / n;
    const double cond_variance = std::max(0.0, sums.cond_squared / n - cond_mean * cond_mean);
    const double guided_variance = std::max(0.0, sums.guided_squared / n - guided_mean * guided_mean);
    const double phi = statistics.rescale;
    if (guided_variance > 0.0) {
      frame.coef.gain = static_cast<float>(phi * (std::sqrt(cond_variance) / std::sqrt(guided_variance)) + (1.0 - phi));
    }
  }
  if (statistics.percentile > 0.0) {
    // The magnitudes take the average's place, so that the quantile may reorder them.
    loops.magnitude(frame.x, average, frame.coef.u, frame.coef.v, frame.coef.gain, average, count);
    const double floor = frame.coef.clip;
    double threshold = std::max(floor, quantile(scratch, count, statistics.percentile));
    if (statistics.threshold_max > 0.0) threshold = std::min(threshold, std::max(floor, statistics.threshold_max));
    frame.coef.clip = static_cast<float>(threshold);
    frame.coef.scale = static_cast<float>(floor / static_cast<double>(frame.coef.clip));
  }
}

}  // namespace lumiere
