#include "lumiere/attention.hpp"

#include <algorithm>
#include <atomic>
#include <vector>

namespace lumiere {

namespace baseline {
extern const AttentionPart attention_part;
}
#ifdef LUMIERE_X86
namespace avx2 {
extern const AttentionPart attention_part;
}
namespace avx512 {
extern const AttentionPart attention_part;
}
#endif

AttentionPart attention_part_by_index(int index) {
  if (inner_loops_by_index(index) == nullptr) return nullptr;
#ifdef LUMIERE_X86
  if (index == 1) return avx2::attention_part;
  if (index == 2) return avx512::attention_part;
#endif
  return baseline::attention_part;
}

AttentionPart attention_part() {
  for (int index = num_inner_loops() - 1; index > 0; --index) {
    if (const AttentionPart part = attention_part_by_index(index)) return part;
  }
  return baseline::attention_part;
}

bool has_attention(std::int64_t head_dim) { return head_dim == 16 || head_dim == 32 || head_dim == 64; }

// Keys and values in fp32, and the scores of up to eight queries.
std::int64_t attention_scratch(const Attention& call) { return (2 * call.head_dim + 8) * ((call.keys + 15) / 16 * 16); }

void attention(const Attention& call, AttentionPart part, ParallelRegion parallel, int num_threads) {
  struct Shared {
    const Attention& call;
    AttentionPart part;
    std::int64_t pieces, count, floats;
    std::vector<float> scratch;
    std::atomic<std::int64_t> next{0}, next_thread{0};
  };
  const std::int64_t pieces = (call.queries + kAttentionQueries - 1) / kAttentionQueries;
  const std::int64_t count = call.sequences * call.heads * pieces;
  if (count == 0) return;
  const std::int64_t threads = parallel == nullptr ? 1 : std::clamp<std::int64_t>(num_threads, 1, count);
  const std::int64_t floats = attention_scratch(call);
  Shared shared{call, part, pieces, count, floats, std::vector<float>(static_cast<std::size_t>(threads * floats))};
  const auto body = [](void* data) {
    Shared& s = *static_cast<Shared*>(data);
    float* scratch = s.scratch.data() + s.next_thread++ * s.floats;
    for (std::int64_t i; (i = s.next++) < s.count;) {
      const std::int64_t first = i % s.pieces * kAttentionQueries, row = i / s.pieces;
      s.part(s.call, row / s.call.heads, row % s.call.heads, first, std::min(first + kAttentionQueries, s.call.queries),
             scratch);
    }
  };
  if (threads == 1) {
    body(&shared);
  } else {
    parallel(body, &shared, static_cast<unsigned>(threads), 0);
  }
}

}  // namespace lumiere
