// Compiled several times with different instruction sets: includes no library header, so that no inline function of
// the standard library is emitted for a processor that may not be there.
#include "lumiere/inner_loops.hpp"

#ifdef __SSE2__
#include <immintrin.h>  // intrinsics only: always inlined
#endif

namespace lumiere {
namespace LUMIERE_SIMD {
namespace {

using u32 = std::uint32_t;
using u64 = std::uint64_t;
using i32 = std::int32_t;

constexpr int kBlock = 1024;  // values per pass: four of these stay in the first-level cache

inline float float_of_bits(i32 bits) { return __builtin_bit_cast(float, bits); }
inline i32 bits_of_float(float value) { return __builtin_bit_cast(i32, value); }

inline float half_to_float(std::uint16_t half) {
  const u32 sign = static_cast<u32>(half & 0x8000u) << 16;
  const u32 magnitude = static_cast<u32>(half & 0x7fffu) << 13;
  // Exponent bias 15 -> 127 by one exact multiplication, which also normalises subnormals; infinities keep theirs.
  const float scaled = float_of_bits(static_cast<i32>(magnitude)) * 0x1p112f;
  const u32 bits = static_cast<u32>(bits_of_float(scaled)) | ((half & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u);
  return float_of_bits(static_cast<i32>(bits | sign));
}

inline float bfloat_to_float(std::uint16_t bits) { return float_of_bits(static_cast<i32>(static_cast<u32>(bits) << 16)); }

// `count` values from `offset` on, as fp32: a pointer into `values` itself when it is fp32, else to `buffer`.
inline const float* as_float(const void* values, ElementType type, std::int64_t offset, int count, float* buffer) {
  if (type == ElementType::float32) return static_cast<const float*>(values) + offset;
  const auto* halves = static_cast<const std::uint16_t*>(values) + offset;
  if (type == ElementType::bfloat16) {
    for (int i = 0; i < count; ++i) buffer[i] = bfloat_to_float(halves[i]);
  } else {
    for (int i = 0; i < count; ++i) buffer[i] = half_to_float(halves[i]);
  }
  return buffer;
}

// ---- noise: see kernels/denoise_step.py for the definition --------------------------------------------------------

constexpr int kCounters = 64;  // of four values each, made together

inline void radius_and_angle(const u32* __restrict a, const u32* __restrict b, float* __restrict cosines,
                             float* __restrict sines) {
  for (int i = 0; i < kCounters; ++i) {
    const float uniform = static_cast<float>(static_cast<i32>((a[i] >> 8) + 1)) * 0x1p-24f;
    const i32 bits = bits_of_float(uniform);
    const i32 exponent = (bits - 0x3F3504F3) >> 23;
    const float f = float_of_bits(bits - static_cast<i32>(static_cast<u32>(exponent) << 23)) - 1.0f;
    const float e = static_cast<float>(exponent);
    float poly = -0.07635655254125595f;
    poly = poly * f + 0.12763327360153198f;
    poly = poly * f + -0.1316058188676834f;
    poly = poly * f + 0.14201553165912628f;
    poly = poly * f + -0.16623298823833466f;
    poly = poly * f + 0.20001234114170074f;
    poly = poly * f + -0.250008225440979f;
    poly = poly * f + 0.3333333134651184f;
    const float z = f * f;
    float tail = (poly * f) * z;
    tail = tail + e * -2.1219444170128554e-4f;
    tail = tail - z * 0.5f;
    const float log = (f + tail) + e * 0.693359375f;
    const float radius = __builtin_sqrtf(log * -2.0f);

    const i32 k = static_cast<i32>(b[i] >> 8);
    const i32 quarter = (k + (1 << 21)) >> 22;
    const float x = static_cast<float>(k - (quarter << 22)) * 0x1p-24f;
    const float y = x * x;
    float sine = ((y * -76.76246643066406f + 81.62535095214844f) * y + -41.34186553955078f) * y + 6.2831854820251465f;
    sine = sine * x;
    float cosine = ((y * 59.22924041748047f + -85.4432373046875f) * y + 64.93932342529297f) * y + -19.739208221435547f;
    cosine = cosine * y + 1.0f;
    // Swap in odd quarters and set the signs, on the bits: the same as choosing and negating.
    const i32 swap = -(quarter & 1);
    const i32 cos_bits = bits_of_float(cosine), sin_bits = bits_of_float(sine);
    const i32 difference = (cos_bits ^ sin_bits) & swap;
    const i32 first = (cos_bits ^ difference) ^ static_cast<i32>(static_cast<u32>((quarter + 1) & 2) << 30);
    const i32 second = (sin_bits ^ difference) ^ static_cast<i32>(static_cast<u32>(quarter & 2) << 30);
    cosines[i] = radius * float_of_bits(first);
    sines[i] = radius * float_of_bits(second);
  }
}

// Counters side by side, one in each 64-bit lane: a product of 32-bit words is then one instruction and one lane.
#if defined(__AVX512F__)
using Wide = __m512i;
inline Wide multiply(Wide a, Wide b) { return _mm512_mul_epu32(a, b); }
#elif defined(__AVX2__)
using Wide = __m256i;
inline Wide multiply(Wide a, Wide b) { return _mm256_mul_epu32(a, b); }
#elif defined(__SSE2__)
using Wide = __m128i;
inline Wide multiply(Wide a, Wide b) { return _mm_mul_epu32(a, b); }
#else
using Wide = u64 __attribute__((vector_size(16)));
inline Wide multiply(Wide a, Wide b) { return (a & 0xffffffffu) * (b & 0xffffffffu); }
#endif
using Lanes = u64 __attribute__((vector_size(sizeof(Wide))));
using Words = u32 __attribute__((vector_size(sizeof(Wide) / 2)));
constexpr int kLanes = sizeof(Wide) / sizeof(u64);

inline Lanes product(Lanes a, Lanes b) { return (Lanes)multiply((Wide)a, (Wide)b); }
inline Lanes in_all(u64 value) { return Lanes{} + value; }

// 4 * kCounters normals from `position` (a multiple of 4) on.
inline void noise_tile(const NoiseKey& key, std::int64_t position, float* __restrict out) {
  alignas(64) u32 words[4][kCounters];
  const u32 first = static_cast<u32>(static_cast<u64>(position) / 4);
  const Lanes factor_a = in_all(0xD2511F53u), factor_c = in_all(0xCD9E8D57u);
  Lanes index{};
  for (int lane = 0; lane < kLanes; ++lane) index[lane] = static_cast<u64>(lane);
  for (int i = 0; i < kCounters; i += kLanes) {
    // Only the low half of a lane counts; what stands above is never read.
    Lanes a = index + in_all(first + static_cast<u32>(i)), b = in_all(static_cast<u32>(key.frame));
    Lanes c = in_all(static_cast<u32>(key.step) + 1u), d = in_all(key.stage);
    u32 k0 = static_cast<u32>(key.seed), k1 = static_cast<u32>(key.seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
      const Lanes left = product(a, factor_a), right = product(c, factor_c);
      a = (right >> 32) ^ b ^ in_all(k0);
      b = right;
      c = (left >> 32) ^ d ^ in_all(k1);
      d = left;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    const Lanes all[4] = {a, b, c, d};
    for (int word = 0; word < 4; ++word) {
      const auto narrow = __builtin_convertvector(all[word], Words);
      __builtin_memcpy(&words[word][i], &narrow, sizeof(narrow));
    }
  }
  alignas(64) float normals[4][kCounters];
  radius_and_angle(words[0], words[1], normals[0], normals[1]);
  radius_and_angle(words[2], words[3], normals[2], normals[3]);
  for (int i = 0; i < kCounters; ++i) {
    out[4 * i] = normals[0][i];
    out[4 * i + 1] = normals[1][i];
    out[4 * i + 2] = normals[2][i];
    out[4 * i + 3] = normals[3][i];
  }
}

// kBlock normals. `before_tile(i)` is called before value i and the 4 * kCounters - 1 after it are made.
template <typename BeforeTile>
inline void noise_block(const NoiseKey& key, std::int64_t position, float* out, BeforeTile before_tile) {
  for (int i = 0; i < kBlock; i += 4 * kCounters) {
    before_tile(i);
    noise_tile(key, position + i, out + i);
  }
}

void noise(const NoiseKey& key, std::int64_t position, std::int64_t count, float* out) {
  alignas(64) float block[kBlock];
  for (std::int64_t done = 0; done < count; done += kBlock) {
    noise_block(key, position + done, block, [](int) {});
    const std::int64_t size = count - done < kBlock ? count - done : kBlock;
    __builtin_memcpy(out + done, block, static_cast<u64>(size) * sizeof(float));
  }
}

void initial(const NoiseKey& key, const float* clean, float alpha, float sigma, std::int64_t position,
             std::int64_t count, float* out) {
  alignas(64) float block[kBlock];
  for (std::int64_t done = 0; done < count; done += kBlock) {
    noise_block(key, position + done, block, [](int) {});
    const int size = count - done < kBlock ? static_cast<int>(count - done) : kBlock;
    float* to = out + done;
    if (clean != nullptr) {
      const float* from = clean + done;
      for (int i = 0; i < size; ++i) to[i] = alpha * from[i] + sigma * block[i];
    } else {
      for (int i = 0; i < size; ++i) to[i] = sigma * block[i];
    }
  }
}

// ---- step ---------------------------------------------------------------------------------------------------------

// avg (before gain) of one block; `total` is where it lies. With one fp32 output and no guidance nothing is copied.
template <bool kGuided>
inline void average_block(const StepPart& part, std::int64_t offset, int size, float* __restrict total) {
  alignas(64) float cond_buffer[kBlock], uncond_buffer[kBlock];
  const float guidance = part.coef.guidance;
  for (int i = 0; part.num_outputs == 0 && i < size; ++i) total[i] = -0.0f;
  for (int k = 0; k < part.num_outputs; ++k) {
    const Output& output = part.outputs[k];
    const float weight = output.weight;
    const float* __restrict cond = as_float(output.cond, part.type, offset, size, cond_buffer);
    if constexpr (kGuided) {
      const float* __restrict uncond = as_float(output.uncond, part.type, offset, size, uncond_buffer);
      if (k == 0) {
        for (int i = 0; i < size; ++i) total[i] = weight * (uncond[i] + guidance * (cond[i] - uncond[i]));
      } else {
        for (int i = 0; i < size; ++i) total[i] = total[i] + weight * (uncond[i] + guidance * (cond[i] - uncond[i]));
      }
    } else if (k == 0) {
      for (int i = 0; i < size; ++i) total[i] = weight * cond[i];
    } else {
      for (int i = 0; i < size; ++i) total[i] = total[i] + weight * cond[i];
    }
  }
}

inline bool is_guided(const StepPart& part) { return part.num_outputs > 0 && part.outputs[0].uncond != nullptr; }

// Where the average of a block comes from: from `average_block`, or, the commonest cases, from one or two fp32 outputs
// in the same loop as the update, so that every stream is walked evenly and the processor can fetch ahead.
enum class From { block, one, two };

template <bool kGuided, From kFrom, bool kPrevious, bool kNoise, bool kStoreX0>
inline void update_block(const StepPart& part, std::int64_t offset, int size, const float* __restrict average,
                         const float* __restrict normals) {
  const StepCoefficients c = part.coef;
  // x_next may be x and x0 may be x0_prev, element by element: the loops below read before they write.
  const float* x = part.x + offset;
  const float* previous = kPrevious ? part.x0_prev + offset : nullptr;
  float* next = part.x_next + offset;
  float* x0_out = kStoreX0 ? part.x0 + offset : nullptr;
  const Output none{};
  const Output& first = kFrom == From::block ? none : part.outputs[0];
  const Output& second = kFrom == From::two ? part.outputs[1] : none;
  const float first_weight = first.weight, second_weight = second.weight;
  const float* cond = static_cast<const float*>(first.cond) + offset;
  const float* uncond = static_cast<const float*>(first.uncond) + offset;
  const float* cond_2 = static_cast<const float*>(second.cond) + offset;
  const float* uncond_2 = static_cast<const float*>(second.uncond) + offset;
#pragma GCC ivdep
  for (int i = 0; i < size; ++i) {
    float avg;
    if constexpr (kFrom == From::block) {
      avg = average[i];
    } else {
      avg = first_weight * (kGuided ? uncond[i] + c.guidance * (cond[i] - uncond[i]) : cond[i]);
      if constexpr (kFrom == From::two) {
        avg = avg + second_weight * (kGuided ? uncond_2[i] + c.guidance * (cond_2[i] - uncond_2[i]) : cond_2[i]);
      }
    }
    float x0 = c.u * x[i] + c.v * (avg * c.gain);
    x0 = x0 < -c.clip ? -c.clip : x0;
    x0 = x0 > c.clip ? c.clip : x0;
    x0 = x0 * c.scale;
    float value = c.p * x[i] + c.q * x0;
    if constexpr (kPrevious) value = value + c.r * previous[i];
    if constexpr (kNoise) value = value + c.n * normals[i];
    if constexpr (kStoreX0) x0_out[i] = x0;
    next[i] = value;
  }
}

// Asks for the cache line of every stream at `offset`. The processor's own fetching stops at the end of a page.
inline void fetch(const StepPart& part, std::int64_t offset) {
  const std::int64_t bytes = part.type == ElementType::float32 ? 4 * offset : 2 * offset;
  __builtin_prefetch(part.x + offset);
  if (part.x0_prev != nullptr) __builtin_prefetch(part.x0_prev + offset);
  for (int k = 0; k < part.num_outputs; ++k) {
    __builtin_prefetch(static_cast<const char*>(part.outputs[k].cond) + bytes);
    if (part.outputs[k].uncond != nullptr) __builtin_prefetch(static_cast<const char*>(part.outputs[k].uncond) + bytes);
  }
}

template <bool kGuided, From kFrom, bool kPrevious, bool kNoise, bool kStoreX0>
void step_loop(const StepPart& part) {
  alignas(64) float average[kBlock], normals[kBlock];
  for (std::int64_t done = 0; done < part.count; done += kBlock) {
    const int size = part.count - done < kBlock ? static_cast<int>(part.count - done) : kBlock;
    if constexpr (kFrom == From::block) average_block<kGuided>(part, done, size, average);
    if constexpr (kNoise) {
      // The values come from memory while the noise is computed.
      noise_block(part.key, part.position + done, normals, [&](int i) {
        for (int line = i; line < i + 4 * kCounters && line < size; line += 16) fetch(part, done + line);
      });
    } else if (part.count - done > kBlock + 64) {
      for (int line = 0; line < 4; ++line) fetch(part, done + kBlock + 16 * line);
    }
    update_block<kGuided, kFrom, kPrevious, kNoise, kStoreX0>(part, done, size, average, normals);
  }
}

template <bool kGuided, From kFrom>
void choose_loop(const StepPart& part) {
  using Loop = void (*)(const StepPart&);
  static constexpr Loop loops[8] = {
      step_loop<kGuided, kFrom, false, false, false>, step_loop<kGuided, kFrom, false, false, true>,
      step_loop<kGuided, kFrom, false, true, false>,  step_loop<kGuided, kFrom, false, true, true>,
      step_loop<kGuided, kFrom, true, false, false>,  step_loop<kGuided, kFrom, true, false, true>,
      step_loop<kGuided, kFrom, true, true, false>,   step_loop<kGuided, kFrom, true, true, true>};
  loops[(part.x0_prev != nullptr && part.coef.r != 0.0f ? 4 : 0) + (part.coef.n != 0.0f ? 2 : 0) +
        (part.x0 != nullptr ? 1 : 0)](part);
}

void step(const StepPart& part) {
  const bool guided = is_guided(part), direct = part.type == ElementType::float32;
  if (direct && part.num_outputs == 1) {
    guided ? choose_loop<true, From::one>(part) : choose_loop<false, From::one>(part);
  } else if (direct && part.num_outputs == 2) {
    guided ? choose_loop<true, From::two>(part) : choose_loop<false, From::two>(part);
  } else {
    guided ? choose_loop<true, From::block>(part) : choose_loop<false, From::block>(part);
  }
}

// ---- statistics ---------------------------------------------------------------------------------------------------

inline void add_lanes(const float* values, int size, double* sum, double* squares) {
  int i = 0;
  for (; i + kSumLanes <= size; i += kSumLanes) {
    for (int lane = 0; lane < kSumLanes; ++lane) {
      const double value = values[i + lane];
      sum[lane] = sum[lane] + value;
      squares[lane] = squares[lane] + value * value;
    }
  }
  for (int lane = 0; i < size; ++i, ++lane) {
    const double value = values[i];
    sum[lane] = sum[lane] + value;
    squares[lane] = squares[lane] + value * value;
  }
}

inline double add_up(const double* lanes) {
  double total = lanes[0];
  for (int lane = 1; lane < kSumLanes; ++lane) total = total + lanes[lane];
  return total;
}

void average(const StepPart& part, float* out, Sums* sums) {
  alignas(64) float cond_average[kBlock], buffer[kBlock];
  alignas(64) double lanes[4][kSumLanes] = {};
  const bool guided = is_guided(part);
  for (std::int64_t done = 0; done < part.count; done += kBlock) {
    const int size = part.count - done < kBlock ? static_cast<int>(part.count - done) : kBlock;
    if (guided) {
      average_block<true>(part, done, size, out + done);
    } else {
      average_block<false>(part, done, size, out + done);
    }
    if (sums == nullptr) continue;
    for (int k = 0; k < part.num_outputs; ++k) {
      const float weight = part.outputs[k].weight;
      const float* cond = as_float(part.outputs[k].cond, part.type, done, size, buffer);
      if (k == 0) {
        for (int i = 0; i < size; ++i) cond_average[i] = weight * cond[i];
      } else {
        for (int i = 0; i < size; ++i) cond_average[i] = cond_average[i] + weight * cond[i];
      }
    }
    add_lanes(cond_average, size, lanes[0], lanes[1]);
    add_lanes(out + done, size, lanes[2], lanes[3]);
  }
  if (sums != nullptr) *sums = {add_up(lanes[0]), add_up(lanes[1]), add_up(lanes[2]), add_up(lanes[3])};
}

void magnitude(const float* x, const float* average, float u, float v, float gain, float* out, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) {
    out[i] = __builtin_fabsf(u * x[i] + v * (average[i] * gain));
  }
}

bool all_finite(const void* values, ElementType type, std::int64_t count) {
  // Bits of the exponent: all ones means infinite or NaN.
  if (type == ElementType::float32) {
    const auto* bits = static_cast<const u32*>(values);
    for (std::int64_t done = 0; done < count; done += kBlock) {
      const std::int64_t size = count - done < kBlock ? count - done : kBlock;
      u32 largest = 0;
      for (std::int64_t i = 0; i < size; ++i) {
        const u32 magnitude = bits[done + i] & 0x7fffffffu;
        largest = magnitude > largest ? magnitude : largest;
      }
      if (largest >= 0x7f800000u) return false;
    }
    return true;
  }
  const auto* bits = static_cast<const std::uint16_t*>(values);
  const std::uint16_t infinite = type == ElementType::bfloat16 ? 0x7f80u : 0x7c00u;
  std::uint16_t largest = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    const std::uint16_t magnitude = bits[i] & 0x7fffu;
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest < infinite;
}

// ---- pixels -------------------------------------------------------------------------------------------------------

void to_uint8(const float* in, std::int64_t count, std::uint8_t* out) {
  for (std::int64_t i = 0; i < count; ++i) {
    float value = in[i] * 127.5f + 128.0f;
    value = value > 0.0f ? value : 0.0f;  // NaN too
    value = value < 255.0f ? value : 255.0f;
    out[i] = static_cast<std::uint8_t>(static_cast<i32>(value));
  }
}

}  // namespace

extern const InnerLoops loops;
const InnerLoops loops = {
#define LUMIERE_NAME_(x) #x
#define LUMIERE_NAME(x) LUMIERE_NAME_(x)
    LUMIERE_NAME(LUMIERE_SIMD), step, average, magnitude, noise, initial, all_finite, to_uint8,
};

}  // namespace LUMIERE_SIMD
}  // namespace lumiere
