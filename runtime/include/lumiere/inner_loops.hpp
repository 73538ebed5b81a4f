// The loops that touch every value. Compiled once per instruction set from inner_loops.cpp; all give the same bits.
#pragma once

#include <cstdint>

namespace lumiere {

enum class ElementType : int { float32 = 0, bfloat16 = 1, float16 = 2 };
inline std::int64_t element_bytes(ElementType type) { return type == ElementType::float32 ? 4 : 2; }

// Coefficients of one frame's step, in the order of the columns of `coef` in kernels/denoise_step.py.
struct StepCoefficients {
  float u, v, p, q, r, n, guidance, gain, clip, scale;
};

struct NoiseKey {
  std::uint64_t seed;
  std::uint32_t stage;
  std::int32_t step;  // -1: the initial noise
  std::int64_t frame;
};

// One window's output for a frame. `uncond` is null without guidance.
struct Output {
  const void* cond;
  const void* uncond;
  float weight;
};

// One frame, or a part of it that starts at `position`, a multiple of 4 (for the noise). Pointers are to the part.
struct StepPart {
  const float* x;
  const float* x0_prev;  // may be null; may equal x0
  float* x_next;         // may equal x
  float* x0;             // may be null
  const Output* outputs;
  int num_outputs;
  ElementType type;
  StepCoefficients coef;
  NoiseKey key;
  std::int64_t position;
  std::int64_t count;
};

// Rounding of sums: lane i % 16 adds its values in ascending order; then lane 0 + lane 1 + ... + lane 15.
constexpr int kSumLanes = 16;
struct Sums {
  double cond, cond_squared, guided, guided_squared;
};

struct InnerLoops {
  const char* name;
  void (*step)(const StepPart& part);
  // The window average before gain, and with sums != null the sums of the average of `cond` and of the guided average.
  void (*average)(const StepPart& part, float* average, Sums* sums);
  // |u*x + v*(average*gain)|
  void (*magnitude)(const float* x, const float* average, float u, float v, float gain, float* out, std::int64_t count);
  void (*noise)(const NoiseKey& key, std::int64_t position, std::int64_t count, float* out);
  // out = scale * noise, plus alpha * clean before it where clean is not null; x = alpha*clean + sigma*noise
  void (*initial)(const NoiseKey& key, const float* clean, float alpha, float sigma, std::int64_t position,
                  std::int64_t count, float* out);
  bool (*all_finite)(const void* values, ElementType type, std::int64_t count);
  void (*to_uint8)(const float* in, std::int64_t count, std::uint8_t* out);
};

// The fastest set that this processor runs. The two others are for tests.
const InnerLoops& inner_loops();
int num_inner_loops();
const InnerLoops* inner_loops_by_index(int index);  // null: this processor does not run it

}  // namespace lumiere
