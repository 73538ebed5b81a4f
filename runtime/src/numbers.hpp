// Number formats and exp for the loops that are compiled once per instruction set. No library header, and everything
// inline and without a name outside its file: see inner_loops.cpp.
#pragma once

#include <cstdint>

namespace lumiere {
namespace LUMIERE_SIMD {
namespace {
namespace numbers {

using u16 = std::uint16_t;
using u32 = std::uint32_t;
using i32 = std::int32_t;
using i64 = std::int64_t;

inline float float_of_bits(u32 bits) { return __builtin_bit_cast(float, bits); }
inline u32 bits_of_float(float value) { return __builtin_bit_cast(u32, value); }

struct Float32 {
  using type = float;
  static float load(float value) { return value; }
  static float store(float value) { return value; }
};

struct BFloat16 {
  using type = u16;
  static float load(u16 value) { return float_of_bits(static_cast<u32>(value) << 16); }
  static u16 store(float value) {  // to nearest, ties to even; NaN stays NaN
    const u32 bits = bits_of_float(value);
    const u32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return static_cast<u16>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
  }
};

// exp(-m) for m >= 0; m is held to 87, as an integer, since a floating-point bound would be compiled to a branch or a
// division. A NaN is taken for 87. Relative error below 3 eps.
inline float exp_of(float m) {
  const i32 magnitude = static_cast<i32>(bits_of_float(m));
  m = float_of_bits(static_cast<u32>(magnitude < 0x42ae0000 ? magnitude : 0x42ae0000));
  const float n = __builtin_floorf(m * -1.44269504088896341f + 0.5f);
  const float r = (-m - n * 0.693359375f) + n * 2.12194440e-4f;
  float poly = 1.9875691500e-4f;
  poly = poly * r + 1.3981999507e-3f;
  poly = poly * r + 8.3334519073e-3f;
  poly = poly * r + 4.1665795894e-2f;
  poly = poly * r + 1.6666665459e-1f;
  poly = poly * r + 5.0000001201e-1f;
  poly = poly * (r * r) + r + 1.0f;
  return poly * float_of_bits(static_cast<u32>(static_cast<i32>(n) + 127) << 23);
}

}  // namespace numbers
}  // namespace
}  // namespace LUMIERE_SIMD
}  // namespace lumiere
