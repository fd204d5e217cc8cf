// Rows of activations in decode: norms, rotations and gates, rounded where separate operators would round.
#pragma once

#include "cpu/decode_vec.h"
// After the vectors that its formulas are instantiated for.
#include "common/decode_math.h"

namespace ttt::TTT_ISA {
namespace {

template <class From, class To>
inline void copy_row(const From* from, To* to, int64_t n) {
    for (int64_t i = 0; i < n; i += kLanes) store_upto(to + i, load_upto(from + i, n - i), n - i);
}

template <class T>
inline float row_inverse_rms(const T* x, int64_t n, float eps) {
    vf squares{};
    for (int64_t i = 0; i < n; i += kLanes) {
        const vf v = load_upto(x + i, n - i);
        squares += v * v;
    }
    return inverse_rms(sum_lanes<float>(squares), n, eps);
}

// out = rms_norm(x, weight), rounded to T whatever type holds it.
template <class T, class Out>
inline void normalize(const T* x, const float* weight, Out* out, int64_t n, float eps) {
    const float r = row_inverse_rms(x, n, eps);
    for (int64_t i = 0; i < n; i += kLanes)
        store_upto(out + i, normalized<T>(load_upto(x + i, n - i), r, load_upto(weight + i, n - i)), n - i);
}

// x += rms_norm(y, weight)
template <class T>
inline void add_normalized(T* x, const T* y, const float* weight, int64_t n, float eps) {
    const float r = row_inverse_rms(y, n, eps);
    for (int64_t i = 0; i < n; i += kLanes) {
        const vf change = normalized<T>(load_upto(y + i, n - i), r, load_upto(weight + i, n - i));
        store_upto(x + i, load_upto(x + i, n - i) + change, n - i);
    }
}

// One head's rms_norm, then its rotation by interleaved pairs, rounded to T after each; `turned` is scratch
// for n elements.
template <class T, class Out>
inline void normalize_and_rotate(const T* x, const float* weight, const float* cos, const float* sin,
                                 float* turned, Out* out, int64_t n, float eps) {
    normalize(x, weight, turned, n, eps);
    for (int64_t i = 0; i < n / 2; ++i) rotate(turned[2 * i], turned[2 * i + 1], cos[i], sin[i]);
    for (int64_t i = 0; i < n; i += kLanes)
        store_upto(out + i, rounded<T>(load_upto(turned + i, n - i)), n - i);
}

// A function of its own, so that there is one copy of it: see multiply_add.
__attribute__((noinline)) vf one_silu_times(vf gate, vf up) {
    return silu_times(gate, up);
}

// out = silu(gate) * up, both rounded to T first
template <class T>
inline void gated(const float* gate, const float* up, T* out, int64_t n) {
    for (int64_t i = 0; i < n; i += kLanes) {
        const vf g = rounded<T>(load_upto(gate + i, n - i));
        const vf u = rounded<T>(load_upto(up + i, n - i));
        store_upto(out + i, one_silu_times(g, u), n - i);
    }
}

}  // namespace
}  // namespace ttt::TTT_ISA
