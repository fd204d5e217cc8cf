// The element formulas of decode, for a processor's vectors and a GPU's single floats alike: V is either.
//
// What they are made of is here for floats, and for vectors must be declared before this file is included
// (cpu/decode_vec.h). Sums of products are written as multiply_add, so that no compiler chooses another
// rounding in one copy of a formula than in the next.
#pragma once

#include <cmath>

#include "common/scalar.h"

namespace ttt::TTT_ISA {

TTT_HOST_DEVICE inline float exp(float x) {
    return std::exp(x);
}

TTT_HOST_DEVICE inline float multiply_add(float a, float b, float c) {
#if defined(__CUDA_ARCH__) || defined(__FP_FAST_FMAF)
    return fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

// v as it comes back from a tensor of T.
template <class T>
TTT_HOST_DEVICE inline float rounded(float v) {
    return to_compute(from_compute<T>(v));
}

// The reciprocal root mean square of n elements whose squares add up to `squares`.
TTT_HOST_DEVICE inline float inverse_rms(float squares, int64_t n, float eps) {
    return 1.0f / std::sqrt(squares / static_cast<float>(n) + eps);
}

// rms_norm of v, whose row has the reciprocal root mean square r.
template <class T, class V>
TTT_HOST_DEVICE inline V normalized(V v, float r, V weight) {
    return rounded<T>(v * r * weight);
}

// The pair (a, b) turned by an angle.
template <class V>
TTT_HOST_DEVICE inline void rotate(V& a, V& b, V cos, V sin) {
    const V first = multiply_add(a, cos, -(b * sin));
    b = multiply_add(a, sin, b * cos);
    a = first;
}

template <class V>
TTT_HOST_DEVICE inline V silu_times(V gate, V up) {
    return gate / (1.0f + exp(-gate)) * up;
}

// What softmax has summed is relative to the largest score so far: how much of it is left when that was
// `before` and is `now`. Both may be -infinity, before the first score.
TTT_HOST_DEVICE inline float shrinkage(float before, float now) {
    return before == now ? 1.0f : exp(before - now);
}

// A score's weight, relative to the largest so far.
template <class V>
TTT_HOST_DEVICE inline V softmax_weight(V score, V scale, V largest) {
    return exp(multiply_add(score, scale, -largest));
}

}  // namespace ttt::TTT_ISA
