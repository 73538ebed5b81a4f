// Per-frame numbers that a step needs beforehand: the gain of guidance rescale and the dynamic threshold.
#pragma once

#include <vector>

#include "lumiere/inner_loops.hpp"

namespace lumiere {

struct Statistics {
  float rescale = 0.0f;      // phi: gain = phi * std(cond) / std(guided) + 1 - phi; 0 is off
  double percentile = 0.0;   // of |x0|, in (0, 1]; 0 is off
  double threshold_max = 0;  // largest threshold; 0 is none
};

// Sets gain, clip and scale in `frame.coef`, whose clip on entry is the smallest threshold. With s the quantile of |x0|
// (linear between the two nearest values), held to [clip, threshold_max]: x0 is clamped to [-s, s], then scaled by clip/s.
// Sums and quotients are in double, in the order that `kSumLanes` says, whatever the number of threads.
void apply_statistics(const Statistics& statistics, const InnerLoops& loops, StepPart& frame,
                      std::vector<float>& scratch);

}  // namespace lumiere
