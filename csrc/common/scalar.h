// Element types, and what they are computed in.
#pragma once

#include <cstdint>
#include <cstring>

// Formulas of single elements are the same on processors and GPUs; nvcc wants to be told.
#ifdef __CUDACC__
#define TTT_HOST_DEVICE __host__ __device__
#else
#define TTT_HOST_DEVICE
#endif

namespace ttt {

// The codes that Python passes for an element type (ttt_kernels/extension.py).
enum class Dtype : int { f32 = 0, bf16 = 1, f16 = 2, f64 = 3 };

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

template <class T>
struct Compute {
    using type = float;
};
template <>
struct Compute<double> {
    using type = double;
};
template <class T>
using compute_t = typename Compute<T>::type;

}  // namespace ttt

#ifdef TTT_ISA
namespace ttt::TTT_ISA {

template <class To, class From>
TTT_HOST_DEVICE inline To bit_cast(const From& from) {
    static_assert(sizeof(To) == sizeof(From), "bit_cast between types of different size");
    To to;
    std::memcpy(&to, &from, sizeof(To));
    return to;
}

TTT_HOST_DEVICE inline float to_compute(float x) {
    return x;
}
TTT_HOST_DEVICE inline double to_compute(double x) {
    return x;
}
TTT_HOST_DEVICE inline float to_compute(bf16 x) {
    return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16);
}
TTT_HOST_DEVICE inline float to_compute(f16 x) {
#ifdef __CUDA_ARCH__
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
    return wide;
#else
    const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
    const uint32_t rest = static_cast<uint32_t>(x.bits & 0x7fffu);
    if (rest >= 0x7c00u) return bit_cast<float>(sign | 0x7f800000u | ((rest & 0x3ffu) << 13));
    // Reading the exponent and fraction as a float scaled by 2^-112 covers normal and subnormal numbers
    // alike.
    const float magnitude = bit_cast<float>(rest << 13) * 0x1p112f;
    return bit_cast<float>(sign | bit_cast<uint32_t>(magnitude));
#endif
}

// Rounds to nearest, ties to even; NaN stays NaN.
template <class T>
TTT_HOST_DEVICE inline T from_compute(compute_t<T> x);
template <>
TTT_HOST_DEVICE inline float from_compute<float>(float x) {
    return x;
}
template <>
TTT_HOST_DEVICE inline double from_compute<double>(double x) {
    return x;
}
template <>
TTT_HOST_DEVICE inline bf16 from_compute<bf16>(float x) {
#ifdef __CUDA_ARCH__
    bf16 rounded;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(rounded.bits) : "f"(x));
    return rounded;
#else
    const uint32_t u = bit_cast<uint32_t>(x);
    if (x != x) return bf16{static_cast<uint16_t>((u >> 16) | 0x40u)};
    return bf16{static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
#endif
}
template <>
TTT_HOST_DEVICE inline f16 from_compute<f16>(float x) {
#ifdef __CUDA_ARCH__
    f16 rounded;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(rounded.bits) : "f"(x));
    return rounded;
#else
    const uint32_t u = bit_cast<uint32_t>(x);
    const uint16_t sign = static_cast<uint16_t>((u >> 16) & 0x8000u);
    const uint32_t rest = u & 0x7fffffffu;
    if (rest > 0x7f800000u) return f16{static_cast<uint16_t>(sign | 0x7e00u)};
    if (rest >= 0x477ff000u) return f16{static_cast<uint16_t>(sign | 0x7c00u)};
    if (rest < 0x38800000u) {
        // Adding 0.5 makes the float unit round at the place of the last subnormal bit.
        const float rounded = bit_cast<float>(rest) + 0.5f;
        return f16{static_cast<uint16_t>(sign | (bit_cast<uint32_t>(rounded) - 0x3f000000u))};
    }
    return f16{static_cast<uint16_t>(sign | ((rest - 0x38000000u + 0xfffu + ((rest >> 13) & 1u)) >> 13))};
#endif
}

// Calls f with a value of the element type that `dtype` names.
template <class F>
inline void dispatch(Dtype dtype, F&& f) {
    switch (dtype) {
        case Dtype::f32:
            return f(float{});
        case Dtype::bf16:
            return f(bf16{});
        case Dtype::f16:
            return f(f16{});
        case Dtype::f64:
            return f(double{});
    }
}

}  // namespace ttt::TTT_ISA
#endif
