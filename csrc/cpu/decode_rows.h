// Rows of activations in decode: vectors with tails, and norms rounded where separate operators would round.
#pragma once

#include <cmath>

#include "common/vec.h"

namespace ttt::TTT_ISA {
namespace {

constexpr int64_t kLanes = lanes<float>;

// The vector at p of which `left` elements are there.
template <class T>
inline vf load_upto(const T* p, int64_t left) {
    return left >= kLanes ? load(p) : load_first(p, left);
}
template <class T>
inline void store_upto(T* p, vf v, int64_t left) {
    if (left >= kLanes)
        store(p, v);
    else
        store_first(p, v, left);
}

// a * b + c, rounded once wherever there is an instruction for it. Left to themselves, compilers fuse in some
// of the copies that they make of an expression and not in others, and which copy runs depends on how many
// threads share the work.
inline vf multiply_add(vf a, vf b, vf c) {
#if defined(__AVX512F__)
    return bit_cast<vf>(_mm512_fmadd_ps(bit_cast<__m512>(a), bit_cast<__m512>(b), bit_cast<__m512>(c)));
#elif defined(__AVX2__)
    return bit_cast<vf>(_mm256_fmadd_ps(bit_cast<__m256>(a), bit_cast<__m256>(b), bit_cast<__m256>(c)));
#elif defined(__FP_FAST_FMAF)
    for (int i = 0; i < kLanes; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
#else
    return a * b + c;
#endif
}

// v as it comes back from a tensor of T.
template <class T>
inline vf rounded(vf v) {
    T buffer[kLanes];
    store(buffer, v);
    return load(buffer);
}

template <class From, class To>
inline void copy_row(const From* from, To* to, int64_t n) {
    for (int64_t i = 0; i < n; i += kLanes) store_upto(to + i, load_upto(from + i, n - i), n - i);
}

template <class T>
inline float inverse_rms(const T* x, int64_t n, float eps) {
    vf squares{};
    for (int64_t i = 0; i < n; i += kLanes) {
        const vf v = load_upto(x + i, n - i);
        squares += v * v;
    }
    return 1.0f / std::sqrt(sum_lanes<float>(squares) / static_cast<float>(n) + eps);
}

// out = rms_norm(x, weight), rounded to T whatever type holds it.
template <class T, class Out>
inline void normalize(const T* x, const float* weight, Out* out, int64_t n, float eps) {
    const float r = inverse_rms(x, n, eps);
    for (int64_t i = 0; i < n; i += kLanes)
        store_upto(out + i, rounded<T>(load_upto(x + i, n - i) * r * load_upto(weight + i, n - i)), n - i);
}

// x += rms_norm(y, weight)
template <class T>
inline void add_normalized(T* x, const T* y, const float* weight, int64_t n, float eps) {
    const float r = inverse_rms(y, n, eps);
    for (int64_t i = 0; i < n; i += kLanes) {
        const vf change = rounded<T>(load_upto(y + i, n - i) * r * load_upto(weight + i, n - i));
        store_upto(x + i, load_upto(x + i, n - i) + change, n - i);
    }
}

// One head's rms_norm, then its rotation by interleaved pairs, rounded to T after each; `turned` is scratch
// for n elements.
template <class T, class Out>
inline void normalize_and_rotate(const T* x, const float* weight, const float* cos, const float* sin,
                                 float* turned, Out* out, int64_t n, float eps) {
    normalize(x, weight, turned, n, eps);
    for (int64_t i = 0; i < n / 2; ++i) {
        const float a = turned[2 * i], b = turned[2 * i + 1];
        turned[2 * i] = a * cos[i] - b * sin[i];
        turned[2 * i + 1] = a * sin[i] + b * cos[i];
    }
    for (int64_t i = 0; i < n; i += kLanes)
        store_upto(out + i, rounded<T>(load_upto(turned + i, n - i)), n - i);
}

// A function of its own, so that there is one copy of it: see multiply_add.
__attribute__((noinline)) vf silu_times(vf gate, vf up) {
    return gate / (1.0f + exp(-gate)) * up;
}

// out = silu(gate) * up, both rounded to T first
template <class T>
inline void gated(const float* gate, const float* up, T* out, int64_t n) {
    for (int64_t i = 0; i < n; i += kLanes) {
        const vf g = rounded<T>(load_upto(gate + i, n - i));
        const vf u = rounded<T>(load_upto(up + i, n - i));
        store_upto(out + i, silu_times(g, u), n - i);
    }
}

}  // namespace
}  // namespace ttt::TTT_ISA
