#include "lumiere/group_norm.hpp"

#include <algorithm>
#include <atomic>
#include <vector>

namespace lumiere {

namespace baseline {
extern const GroupNormFrame group_norm_frame;
}
#ifdef LUMIERE_X86
namespace avx2 {
extern const GroupNormFrame group_norm_frame;
}
namespace avx512 {
extern const GroupNormFrame group_norm_frame;
}
#endif

GroupNormFrame group_norm_frame_by_index(int index) {
  if (inner_loops_by_index(index) == nullptr) return nullptr;
#ifdef LUMIERE_X86
  if (index == 1) return avx2::group_norm_frame;
  if (index == 2) return avx512::group_norm_frame;
#endif
  return baseline::group_norm_frame;
}

GroupNormFrame group_norm_frame() {
  for (int index = num_inner_loops() - 1; index > 0; --index) {
    if (const GroupNormFrame frame = group_norm_frame_by_index(index)) return frame;
  }
  return baseline::group_norm_frame;
}

void group_norm(const GroupNorm& call, GroupNormFrame frame, ParallelRegion parallel, int num_threads) {
  struct Shared {
    const GroupNorm& call;
    GroupNormFrame frame;
    std::vector<double> scratch;
    std::atomic<std::int64_t> next_frame{0}, next_thread{0};
  };
  const std::int64_t threads = parallel == nullptr ? 1 : std::clamp<std::int64_t>(num_threads, 1, call.frames);
  const std::int64_t per_thread = kGroupNormScratch * call.channels;
  Shared shared{call, frame, std::vector<double>(static_cast<std::size_t>(threads * per_thread))};
  const auto body = [](void* data) {
    Shared& s = *static_cast<Shared*>(data);
    double* scratch = s.scratch.data() + s.next_thread++ * kGroupNormScratch * s.call.channels;
    for (std::int64_t f; (f = s.next_frame++) < s.call.frames;) s.frame(s.call, f, scratch);
  };
  if (threads == 1) {
    body(&shared);
  } else {
    parallel(body, &shared, static_cast<unsigned>(threads), 0);
  }
}

}  // namespace lumiere
