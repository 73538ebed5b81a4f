#include "lumiere/group_norm.hpp"

#include "share_out.hpp"

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
  share_out<double>(parallel, num_threads, call.frames, kGroupNormScratch * call.channels,
                    [&](std::int64_t f, double* scratch) { frame(call, f, scratch); });
}

}  // namespace lumiere
