// One sampler step and the noise of a frame. kernels/denoise_step.py is the definition; this gives the same bits.
//
// Every product and every sum is rounded by itself: on the device by the _rn intrinsics, which the compiler never
// contracts; on the host (used by tests) compile with -ffp-contract=off.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define LUMIERE_HOST_DEVICE __host__ __device__ __forceinline__
#else
#include <cmath>
#include <cstring>
#define LUMIERE_HOST_DEVICE inline
#endif

namespace lumiere {

enum class OutType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// Device pointers, all tensors contiguous. x_new may be x, and x0_new may be x0_prev.
//
// With `slots` the states are a ring: frame f is row slots[f] of x, x0_prev, x_new and x0_new.
struct DenoiseStepArgs {
    const float* x;            // [num_frames or slots, positions]
    const float* x0_prev;      // as x, or null; read in frames with r != 0
    const void* out;           // [num_outputs, out_rows, positions]
    const std::int32_t* rows;  // [num_frames, num_windows]; -1 = none, -2 - r = row r of kept
    const float* weights;      // [num_frames, num_windows]
    const float* coef;         // [num_frames, 10]: u v p q r n guidance gain clip scale
    const std::int64_t* key;   // [num_frames, 5]: seed stage step frame unused
    float* x_new;              // as x
    float* x0_new;             // as x, or null
    std::int64_t num_frames;
    std::int64_t positions;
    std::int64_t out_rows;
    std::int32_t num_windows;
    std::int32_t num_outputs;  // 2 with guidance: with the prompt, then without
    const std::int32_t* slots = nullptr;  // [num_frames], each at most once; null: frame f is row f
    const void* kept = nullptr;           // [num_outputs, kept_rows, positions], rows of earlier calls
    std::int64_t kept_rows = 0;
    const std::int32_t* halt = nullptr;  // where *halt != 0, nothing is done
};

#ifdef __CUDACC__
// Enqueue on `stream`; neither synchronises. Nothing is checked but the sizes: cudaErrorInvalidValue where they do not
// fit a launch.
cudaError_t launch_denoise_step(const DenoiseStepArgs& args, OutType out_type, cudaStream_t stream);
// noise [num_frames, positions] of the rows of key [num_frames, 5].
cudaError_t launch_frame_noise(
    float* noise, const std::int64_t* key, std::int64_t num_frames, std::int64_t positions, cudaStream_t stream);
#endif

// ---- arithmetic that is rounded after each operation -----------------------------------------------------------

LUMIERE_HOST_DEVICE float mul(float a, float b) {
#ifdef __CUDA_ARCH__
    return __fmul_rn(a, b);
#else
    return a * b;
#endif
}

LUMIERE_HOST_DEVICE float add(float a, float b) {
#ifdef __CUDA_ARCH__
    return __fadd_rn(a, b);
#else
    return a + b;
#endif
}

LUMIERE_HOST_DEVICE float sub(float a, float b) {
#ifdef __CUDA_ARCH__
    return __fsub_rn(a, b);
#else
    return a - b;
#endif
}

LUMIERE_HOST_DEVICE float square_root(float a) {
#ifdef __CUDA_ARCH__
    return __fsqrt_rn(a);
#else
    return std::sqrt(a);
#endif
}

LUMIERE_HOST_DEVICE std::int32_t bits_of(float a) {
#ifdef __CUDA_ARCH__
    return __float_as_int(a);
#else
    std::int32_t bits;
    memcpy(&bits, &a, sizeof bits);
    return bits;
#endif
}

LUMIERE_HOST_DEVICE float float_of(std::int32_t bits) {
#ifdef __CUDA_ARCH__
    return __int_as_float(bits);
#else
    float a;
    memcpy(&a, &bits, sizeof a);
    return a;
#endif
}

LUMIERE_HOST_DEVICE float to_float(float a) { return a; }
#ifdef __CUDACC__
LUMIERE_HOST_DEVICE float to_float(__half a) { return __half2float(a); }
LUMIERE_HOST_DEVICE float to_float(__nv_bfloat16 a) { return __bfloat162float(a); }
#endif

// ---- noise -----------------------------------------------------------------------------------------------------

struct Words {
    std::uint32_t w[4];
};

// Ten rounds of Philox4x32 (Salmon et al. 2011).
LUMIERE_HOST_DEVICE Words philox4x32(Words c, std::uint32_t k0, std::uint32_t k1) {
    for (int round = 0; round < 10; ++round) {
        const std::uint64_t product0 = std::uint64_t{0xD2511F53u} * c.w[0];
        const std::uint64_t product1 = std::uint64_t{0xCD9E8D57u} * c.w[2];
        c = Words{{
            static_cast<std::uint32_t>(product1 >> 32) ^ c.w[1] ^ k0,
            static_cast<std::uint32_t>(product1),
            static_cast<std::uint32_t>(product0 >> 32) ^ c.w[3] ^ k1,
            static_cast<std::uint32_t>(product0),
        }};
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return c;
}

// sqrt(-2 log(u)) for u = ((word >> 8) + 1) / 2^24.
LUMIERE_HOST_DEVICE float radius_of(std::uint32_t word) {
    const float u = mul(static_cast<float>(static_cast<std::int32_t>((word >> 8) + 1)), 0x1p-24f);
    const std::int32_t bits = bits_of(u);
    const std::int32_t exponent = (bits - 0x3F3504F3) >> 23;
    const float f = sub(float_of(bits - exponent * (1 << 23)), 1.0f);
    const float e = static_cast<float>(exponent);
    float poly = add(mul(-0x1.38c1a6p-4f, f), 0x1.056498p-3f);
    poly = add(mul(poly, f), -0x1.0d875ap-3f);
    poly = add(mul(poly, f), 0x1.22d90ap-3f);
    poly = add(mul(poly, f), -0x1.5471f6p-3f);
    poly = add(mul(poly, f), 0x1.99a012p-3f);
    poly = add(mul(poly, f), -0x1.000228p-2f);
    poly = add(mul(poly, f), 0x1.555554p-2f);
    const float z = mul(f, f);
    float tail = mul(mul(poly, f), z);
    tail = add(tail, mul(e, -0x1.bd0106p-13f));
    tail = sub(tail, mul(z, 0.5f));
    const float log = add(add(f, tail), mul(e, 0x1.63p-1f));
    return square_root(mul(log, -2.0f));
}

// cos and sin of 2 pi u for u = (word >> 8) / 2^24.
LUMIERE_HOST_DEVICE void cos_sin_of(std::uint32_t word, float& cos, float& sin) {
    const std::int32_t k = static_cast<std::int32_t>(word >> 8);
    const std::int32_t quarter = (k + (1 << 21)) >> 22;
    const float x = mul(static_cast<float>(k - quarter * (1 << 22)), 0x1p-24f);
    const float z = mul(x, x);
    float s = add(mul(z, -0x1.330cc4p+6f), 0x1.46805cp+6f);
    s = add(mul(s, z), -0x1.4abc24p+5f);
    s = mul(add(mul(s, z), 0x1.921fb6p+2f), x);
    float c = add(mul(z, 0x1.d9d57cp+5f), -0x1.55c5e0p+6f);
    c = add(mul(c, z), 0x1.03c1dep+6f);
    c = add(mul(c, z), -0x1.3bd3ccp+4f);
    c = add(mul(c, z), 1.0f);
    const bool odd = (quarter & 1) != 0;
    const float first = odd ? s : c;
    const float second = odd ? c : s;
    cos = ((quarter + 1) & 2) != 0 ? -first : first;
    sin = (quarter & 2) != 0 ? -second : second;
}

struct Quad {
    float v[4];
};

// Normals of positions 4 * counter ... 4 * counter + 3 of the frame that `key` names.
LUMIERE_HOST_DEVICE Quad noise_quad(const std::int64_t* key, std::uint32_t counter) {
    const std::uint64_t seed = static_cast<std::uint64_t>(key[0]);
    const Words words = philox4x32(
        Words{{
            counter,
            static_cast<std::uint32_t>(key[3]),
            static_cast<std::uint32_t>(key[2] + 1),
            static_cast<std::uint32_t>(key[1]),
        }},
        static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32));
    Quad normals;
    for (int pair = 0; pair < 2; ++pair) {
        const float radius = radius_of(words.w[2 * pair]);
        float cos, sin;
        cos_sin_of(words.w[2 * pair + 1], cos, sin);
        normals.v[2 * pair] = mul(radius, cos);
        normals.v[2 * pair + 1] = mul(radius, sin);
    }
    return normals;
}

// ---- four positions of one frame ----------------------------------------------------------------------------------

// kVector: positions is a multiple of 4 and every pointer is aligned to four elements.
template <bool kVector, typename T>
LUMIERE_HOST_DEVICE Quad load_quad(const T* from, int valid) {
    struct alignas(4 * sizeof(T)) Packed {
        T v[4];
    };
    Quad quad{};
    if constexpr (kVector) {
        const Packed packed = *reinterpret_cast<const Packed*>(from);
        for (int i = 0; i < 4; ++i) quad.v[i] = to_float(packed.v[i]);
    } else {
        for (int i = 0; i < 4; ++i) {
            if (i < valid) quad.v[i] = to_float(from[i]);
        }
    }
    return quad;
}

template <bool kVector>
LUMIERE_HOST_DEVICE void store_quad(float* to, const Quad& quad, int valid) {
    struct alignas(16) Packed {
        float v[4];
    };
    if constexpr (kVector) {
        *reinterpret_cast<Packed*>(to) = Packed{{quad.v[0], quad.v[1], quad.v[2], quad.v[3]}};
    } else {
        for (int i = 0; i < 4; ++i) {
            if (i < valid) to[i] = quad.v[i];
        }
    }
}

template <typename T, bool kVector>
LUMIERE_HOST_DEVICE void denoise_quad(const DenoiseStepArgs& a, std::int64_t frame, std::int64_t counter) {
    const std::int64_t first = 4 * counter;
    const std::int64_t left = a.positions - first;
    const int valid = left < 4 ? static_cast<int>(left) : 4;
    if (a.halt != nullptr && *a.halt != 0) return;
    const std::int64_t at = (a.slots != nullptr ? a.slots[frame] : frame) * a.positions + first;
    const float* coef = a.coef + frame * 10;
    const float u = coef[0], v = coef[1], p = coef[2], q = coef[3], r = coef[4], n = coef[5];
    const float guidance = coef[6], gain = coef[7], clip = coef[8], scale = coef[9];

    const Quad x = load_quad<kVector>(a.x + at, valid);
    Quad avg{{-0.0f, -0.0f, -0.0f, -0.0f}};  // -0 is neutral in a sum, sign of zero included
    for (int k = 0; k < a.num_windows; ++k) {
        const std::int32_t row = a.rows[frame * a.num_windows + k];
        if (row == -1) continue;
        const float weight = a.weights[frame * a.num_windows + k];
        const bool is_kept = row < 0;
        const T* cond = static_cast<const T*>(is_kept ? a.kept : a.out) +
                        std::int64_t{is_kept ? -2 - row : row} * a.positions + first;
        Quad o = load_quad<kVector>(cond, valid);
        if (a.num_outputs == 2) {
            const Quad uncond = load_quad<kVector>(cond + (is_kept ? a.kept_rows : a.out_rows) * a.positions, valid);
            for (int i = 0; i < 4; ++i) o.v[i] = add(uncond.v[i], mul(guidance, sub(o.v[i], uncond.v[i])));
        }
        for (int i = 0; i < 4; ++i) avg.v[i] = add(avg.v[i], mul(weight, o.v[i]));
    }
    Quad x0, next;
    for (int i = 0; i < 4; ++i) {
        float value = add(mul(u, x.v[i]), mul(v, mul(avg.v[i], gain)));
        value = value < -clip ? -clip : value;
        value = value > clip ? clip : value;
        x0.v[i] = mul(value, scale);
        next.v[i] = add(mul(p, x.v[i]), mul(q, x0.v[i]));
    }
    if (a.x0_prev != nullptr && r != 0.0f) {
        const Quad prev = load_quad<kVector>(a.x0_prev + at, valid);
        for (int i = 0; i < 4; ++i) next.v[i] = add(next.v[i], mul(r, prev.v[i]));
    }
    if (n != 0.0f) {
        const Quad noise = noise_quad(a.key + frame * 5, static_cast<std::uint32_t>(counter));
        for (int i = 0; i < 4; ++i) next.v[i] = add(next.v[i], mul(n, noise.v[i]));
    }
    store_quad<kVector>(a.x_new + at, next, valid);
    if (a.x0_new != nullptr) store_quad<kVector>(a.x0_new + at, x0, valid);
}

}  // namespace lumiere
