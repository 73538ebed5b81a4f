#include "lumiere/denoise_step.hpp"

#include <algorithm>
#include <iterator>
#include <vector>

namespace lumiere {

namespace baseline {
extern const InnerLoops loops;
}
#ifdef LUMIERE_X86
namespace avx2 {
extern const InnerLoops loops;
}
namespace avx512 {
extern const InnerLoops loops;
}
#endif

int num_inner_loops() {
#ifdef LUMIERE_X86
  return 3;
#else
  return 1;
#endif
}

const InnerLoops* inner_loops_by_index(int index) {
#ifdef LUMIERE_X86
  // What the compiler may use under -march=x86-64-v3 and -v4.
  if (index == 1 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
      __builtin_cpu_supports("bmi2")) {
    return &avx2::loops;
  }
  if (index == 2 && inner_loops_by_index(1) != nullptr && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return &avx512::loops;
  }
#endif
  return index == 0 ? &baseline::loops : nullptr;
}

const InnerLoops& inner_loops() {
  for (int index = num_inner_loops() - 1; index > 0; --index) {
    if (const InnerLoops* loops = inner_loops_by_index(index)) return *loops;
  }
  return baseline::loops;
}

void denoise_frames(std::span<const StepPart> frames, ThreadPool& pool, const InnerLoops& loops) {
  constexpr std::int64_t kPart = 1 << 16;  // values; a multiple of 4
  struct Piece {
    std::size_t frame;
    std::int64_t offset;
  };
  std::vector<Piece> pieces;
  for (std::size_t f = 0; f < frames.size(); ++f) {
    for (std::int64_t offset = 0; offset < frames[f].count; offset += kPart) pieces.push_back({f, offset});
  }
  pool.for_each(std::ssize(pieces), [&](std::int64_t i) {
    const Piece piece = pieces[static_cast<std::size_t>(i)];
    const StepPart& whole = frames[piece.frame];
    StepPart part = whole;
    const std::int64_t offset = piece.offset;
    part.x += offset;
    part.x_next += offset;
    if (part.x0_prev != nullptr) part.x0_prev += offset;
    if (part.x0 != nullptr) part.x0 += offset;
    part.position += offset;
    part.count = std::min(kPart, whole.count - offset);
    std::vector<Output> outputs(whole.outputs, whole.outputs + whole.num_outputs);
    const std::int64_t bytes = offset * element_bytes(whole.type);
    for (Output& output : outputs) {
      output.cond = static_cast<const char*>(output.cond) + bytes;
      if (output.uncond != nullptr) output.uncond = static_cast<const char*>(output.uncond) + bytes;
    }
    part.outputs = outputs.data();
    loops.step(part);
  });
}

}  // namespace lumiere
