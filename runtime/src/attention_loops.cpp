// Compiled once per instruction set, without library headers; products and sums may be fused: see group_norm_loops.cpp.
#include "lumiere/attention.hpp"
#include "numbers.hpp"

namespace lumiere {
namespace LUMIERE_SIMD {
namespace {

using namespace numbers;

// Sixteen values; the compiler splits it for narrower registers.
typedef float Vec __attribute__((vector_size(64), aligned(4), may_alias));

// Replaces scores by exp(score - largest) and returns their sum; NaN if a score is not finite. Sums by lane, so that they
// do not depend on the instruction set; places from `count` to `used` hold anything finite and become next to nothing.
inline float softmax_numerators(float* s, i64 count, i64 used) {
  Vec most = {}, total = {};
  for (i64 j = 0; j < used; j += 16) total += *reinterpret_cast<const Vec*>(s + j) * 0.0f;
  for (i64 j = count; j < used; ++j) s[j] = -__builtin_inff();
  most -= __builtin_inff();
  for (i64 j = 0; j < used; j += 16) {
    const Vec value = *reinterpret_cast<const Vec*>(s + j);
    most = value > most ? value : most;
  }
  float largest = most[0];
  for (int lane = 1; lane < 16; ++lane) largest = most[lane] > largest ? most[lane] : largest;
  for (i64 j = 0; j < used; ++j) s[j] = exp_of(largest - s[j]);
  for (i64 j = 0; j < used; j += 16) total += *reinterpret_cast<const Vec*>(s + j);
  float sum = 0.0f;
  for (int lane = 0; lane < 16; ++lane) sum += total[lane];
  return sum;
}

template <class Type, int D>
void run(const Attention& call, i64 sequence, i64 head, i64 first, i64 last, float* scratch) {
  using T = typename Type::type;
  constexpr int kRows = D == 64 ? 4 : 8;  // queries at once: their sums stay in registers
  constexpr int kVecs = D / 16;
  const auto begin = [&](const Rows& rows) {
    return reinterpret_cast<T*>(rows.data) + sequence * rows.sequence + head * D;
  };
  const T *q = begin(call.q), *k = begin(call.k), *v = begin(call.v);
  const bool* mask = call.mask == nullptr ? nullptr : call.mask + sequence * call.keys;
  const i64 padded = (call.keys + 15) / 16 * 16;
  float *keys = scratch, *values = keys + D * padded, *scores = values + padded * D;  // [D, padded], [keys, D], [8, padded]

  i64 count = 0;
  for (i64 j = 0; j < call.keys; ++j) {
    if (mask != nullptr && !mask[j]) continue;
    for (int d = 0; d < D; ++d) keys[d * padded + count] = Type::load(k[j * call.k.row + d]);
    for (int d = 0; d < D; ++d) values[count * D + d] = Type::load(v[j * call.v.row + d]);
    ++count;
  }
  const i64 used = (count + 15) / 16 * 16;
  for (int d = 0; d < D; ++d) {
    for (i64 j = count; j < used; ++j) keys[d * padded + j] = 0.0f;
  }

  T* out = begin(call.out);
  for (i64 row = first; row < last; row += kRows) {
    float queries[kRows][D];
    for (int i = 0; i < kRows; ++i) {
      const T* source = q + (row + i < last ? row + i : last - 1) * call.q.row;
      for (int d = 0; d < D; ++d) queries[i][d] = Type::load(source[d]) * call.scale;
    }
    for (i64 j = 0; j < used; j += 16) {
      Vec sums[kRows] = {};
      for (int d = 0; d < D; ++d) {
        const Vec column = *reinterpret_cast<const Vec*>(keys + d * padded + j);
        for (int i = 0; i < kRows; ++i) sums[i] += queries[i][d] * column;
      }
      for (int i = 0; i < kRows; ++i) *reinterpret_cast<Vec*>(scores + i * padded + j) = sums[i];
    }
    float inverse[kRows];
    for (int i = 0; i < kRows; ++i) {
      float* s = scores + i * padded;
      inverse[i] = count > 0 ? 1.0f / softmax_numerators(s, count, used) : 0.0f;
    }
    Vec sums[kRows][kVecs] = {};
    for (i64 j = 0; j < count; ++j) {
      for (int d = 0; d < kVecs; ++d) {
        const Vec value = *reinterpret_cast<const Vec*>(values + j * D + 16 * d);
        for (int i = 0; i < kRows; ++i) sums[i][d] += scores[i * padded + j] * value;
      }
    }
    for (int i = 0; i < kRows && row + i < last; ++i) {
      float result[D];
      for (int d = 0; d < kVecs; ++d) *reinterpret_cast<Vec*>(result + 16 * d) = sums[i][d] * inverse[i];
      T* to = out + (row + i) * call.out.row;
      for (int d = 0; d < D; ++d) to[d] = Type::store(result[d]);
    }
  }
}

template <class Type>
void by_head(const Attention& call, i64 sequence, i64 head, i64 first, i64 last, float* scratch) {
  if (call.head_dim == 16) return run<Type, 16>(call, sequence, head, first, last, scratch);
  if (call.head_dim == 32) return run<Type, 32>(call, sequence, head, first, last, scratch);
  return run<Type, 64>(call, sequence, head, first, last, scratch);
}

}  // namespace

extern const AttentionPart attention_part;
const AttentionPart attention_part = [](const Attention& call, i64 sequence, i64 head, i64 first, i64 last,
                                        float* scratch) {
  call.type == ElementType::float32 ? by_head<Float32>(call, sequence, head, first, last, scratch)
                                    : by_head<BFloat16>(call, sequence, head, first, last, scratch);
};

}  // namespace LUMIERE_SIMD
}  // namespace lumiere
