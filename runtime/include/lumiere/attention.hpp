// Attention of many short sequences: softmax(q k^T * scale) v per sequence and head, for head sizes 16, 32 and 64.
#pragma once

#include <cstdint>

#include "lumiere/inner_loops.hpp"
#include "lumiere/parallel_region.hpp"

namespace lumiere {

// All arrays have one type, fp32 or bf16; the arithmetic is fp32. Row r of sequence s begins at s * sequence + r * row
// values; heads stand side by side in a row.
struct Rows {
  std::uintptr_t data;
  std::int64_t sequence, row;
};

struct Attention {
  Rows q, k, v, out;
  ElementType type;
  std::int64_t sequences, heads, queries, keys, head_dim;
  float scale;
  const bool* mask;  // [sequences, keys], true where a key is seen; null: all are. A sequence without keys gives zeros.
};

constexpr std::int64_t kAttentionQueries = 256;  // of one piece of work

// Queries [first, last) of one sequence and head; `scratch` holds attention_scratch(call) floats.
using AttentionPart = void (*)(const Attention& call, std::int64_t sequence, std::int64_t head, std::int64_t first,
                               std::int64_t last, float* scratch);
std::int64_t attention_scratch(const Attention& call);
bool has_attention(std::int64_t head_dim);

// For the fastest instruction set of this processor, or by the index of `inner_loops_by_index`; null where it does not run.
AttentionPart attention_part();
AttentionPart attention_part_by_index(int index);

// Runs all sequences. Results do not depend on the number of threads.
void attention(const Attention& call, AttentionPart part, ParallelRegion parallel, int num_threads);

}  // namespace lumiere
