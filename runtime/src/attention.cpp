#include "lumiere/attention.hpp"

#include <algorithm>

#include "share_out.hpp"

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
  const std::int64_t pieces = (call.queries + kAttentionQueries - 1) / kAttentionQueries;
  share_out<float>(parallel, num_threads, call.sequences * call.heads * pieces, attention_scratch(call),
                   [&](std::int64_t i, float* scratch) {
                     const std::int64_t first = i % pieces * kAttentionQueries, row = i / pieces;
                     part(call, row / call.heads, row % call.heads, first,
                          std::min(first + kAttentionQueries, call.queries), scratch);
                   });
}

}  // namespace lumiere
