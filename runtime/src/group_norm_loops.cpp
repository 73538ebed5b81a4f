// Compiled once per instruction set, as inner_loops.cpp is, and without library headers for the same reason. Products
// and sums may be fused here: the result is compared with its reference by a tolerance, not by its bits.
#include "lumiere/group_norm.hpp"
#include "numbers.hpp"

namespace lumiere {
namespace LUMIERE_SIMD {
namespace {

using namespace numbers;

// v / (1 + exp(-v)) by t = exp(-|v|), which neither overflows nor becomes subnormal. Relative error below 4 eps.
inline float silu_of(float v) {
  const u32 bits = bits_of_float(v);
  const float t = exp_of(float_of_bits(bits & 0x7fffffffu));
  const float numerator = static_cast<i32>(bits) < 0 ? t : 1.0f;
  return v * numerator / (1.0f + t);
}

// Mean and M2 (sum of squared differences from it) of N neighbouring channels.
template <class Type, int N>
void channel_moments(const typename Type::type* x, i64 pixels, i64 channels, double* mean, double* m2) {
  float first[N];
  double sum[N] = {}, squares[N] = {};
  for (int i = 0; i < N; ++i) first[i] = Type::load(x[i]);
  for (i64 begin = 0; begin < pixels; begin += 256) {
    const i64 end = pixels < begin + 256 ? pixels : begin + 256;
    float part[N] = {}, part_squares[N] = {};
    for (i64 pixel = begin; pixel < end; ++pixel) {
      const auto* values = x + pixel * channels;
      for (int i = 0; i < N; ++i) {
        const float d = Type::load(values[i]) - first[i];
        part[i] += d;
        part_squares[i] += d * d;
      }
    }
    for (int i = 0; i < N; ++i) {
      sum[i] += static_cast<double>(part[i]);
      squares[i] += static_cast<double>(part_squares[i]);
    }
  }
  for (int i = 0; i < N; ++i) {
    const double shift = sum[i] / static_cast<double>(pixels);
    mean[i] = static_cast<double>(first[i]) + shift;
    m2[i] = squares[i] - sum[i] * shift;
  }
}

template <class Type, bool kSilu>
void apply(const typename Type::type* x, typename Type::type* y, i64 pixels, i64 channels, const float* __restrict a,
           const float* __restrict b) {
  for (i64 pixel = 0; pixel < pixels; ++pixel) {
    const auto* __restrict in = x + pixel * channels;
    auto* __restrict out = y + pixel * channels;
    for (i64 i = 0; i < channels; ++i) {
      const float v = Type::load(in[i]) * a[i] + b[i];
      out[i] = Type::store(kSilu ? silu_of(v) : v);
    }
  }
}

template <class Type>
void run(const GroupNorm& call, i64 frame, double* scratch) {
  using T = typename Type::type;
  const i64 channels = call.channels, pixels = call.pixels;
  const T* x = static_cast<const T*>(call.x) + frame * pixels * channels;
  T* y = static_cast<T*>(call.y) + frame * pixels * channels;
  double *mean = scratch, *m2 = mean + channels;
  float *a = reinterpret_cast<float*>(m2 + channels), *b = a + channels;

  i64 c = 0;
  for (; c + 64 <= channels; c += 64) channel_moments<Type, 64>(x + c, pixels, channels, mean + c, m2 + c);
  for (; c + 16 <= channels; c += 16) channel_moments<Type, 16>(x + c, pixels, channels, mean + c, m2 + c);
  for (; c < channels; ++c) channel_moments<Type, 1>(x + c, pixels, channels, mean + c, m2 + c);

  const T *weight = static_cast<const T*>(call.weight), *bias = static_cast<const T*>(call.bias);
  const i64 width = channels / call.groups;
  for (i64 first = 0; first < channels; first += width) {
    double group_mean = 0.0, group_m2 = 0.0;
    for (i64 i = first; i < first + width; ++i) group_mean += mean[i];
    group_mean /= static_cast<double>(width);
    for (i64 i = first; i < first + width; ++i) {
      const double d = mean[i] - group_mean;
      group_m2 += m2[i] + d * d * static_cast<double>(pixels);
    }
    const double variance = group_m2 < 0.0 ? 0.0 : group_m2 / static_cast<double>(width * pixels);
    const float inverse = static_cast<float>(1.0 / __builtin_sqrt(variance + static_cast<double>(call.eps)));
    for (i64 i = first; i < first + width; ++i) {
      a[i] = Type::load(weight[i]) * inverse;
      b[i] = Type::load(bias[i]) - static_cast<float>(group_mean) * a[i];
    }
  }
  if (call.scale != nullptr) {
    const i64 row = frame / call.frames_per_row * call.row_stride;
    const T *scale = static_cast<const T*>(call.scale) + row, *shift = static_cast<const T*>(call.shift) + row;
    for (i64 i = 0; i < channels; ++i) {
      const float gain = 1.0f + Type::load(scale[i]);
      a[i] *= gain;
      b[i] = b[i] * gain + Type::load(shift[i]);
    }
  }
  call.silu ? apply<Type, true>(x, y, pixels, channels, a, b) : apply<Type, false>(x, y, pixels, channels, a, b);
}

}  // namespace

extern const GroupNormFrame group_norm_frame;
const GroupNormFrame group_norm_frame = [](const GroupNorm& call, i64 frame, double* scratch) {
  call.type == ElementType::float32 ? run<Float32>(call, frame, scratch) : run<BFloat16>(call, frame, scratch);
};

}  // namespace LUMIERE_SIMD
}  // namespace lumiere
