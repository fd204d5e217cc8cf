// Vectors of the instruction set that a file is compiled for, written with the compilers' vector types so
// that one source serves all of them; intrinsics only where the compilers do not find the instruction.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/scalar.h"
#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace ttt::TTT_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class C>
struct VecOf;
template <>
struct VecOf<float> {
    typedef float type __attribute__((vector_size(kVectorBytes)));
    typedef int32_t mask __attribute__((vector_size(kVectorBytes)));
    typedef uint32_t bits __attribute__((vector_size(kVectorBytes)));
    typedef uint16_t half __attribute__((vector_size(kVectorBytes / 2)));
};
template <>
struct VecOf<double> {
    typedef double type __attribute__((vector_size(kVectorBytes)));
    typedef int64_t mask __attribute__((vector_size(kVectorBytes)));
};

template <class C>
using vec = typename VecOf<C>::type;
using vf = vec<float>;
using vd = vec<double>;

template <class C>
constexpr int lanes = kVectorBytes / static_cast<int>(sizeof(C));

template <class C>
inline vec<C> splat(C x) {
    return x - vec<C>{};
}

// Loads lanes<compute_t<T>> consecutive elements, widened to the type they are computed in.
inline vf load(const float* p) {
    vf v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
inline vd load(const double* p) {
    vd v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
inline vf load(const bf16* p) {
#if defined(__AVX512F__)
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return bit_cast<vf>(_mm512_slli_epi32(wide, 16));
#elif defined(__AVX2__)
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return bit_cast<vf>(_mm256_slli_epi32(wide, 16));
#else
    VecOf<float>::half h;
    std::memcpy(&h, p, sizeof h);
    return bit_cast<vf>(__builtin_convertvector(h, VecOf<float>::bits) << 16);
#endif
}
inline vf load(const f16* p) {
#if defined(__AVX512F__)
    return bit_cast<vf>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__F16C__)
    return bit_cast<vf>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
    vf v;
    for (int i = 0; i < lanes<float>; ++i) v[i] = to_compute(p[i]);
    return v;
#endif
}

// Stores a vector, rounded to nearest, ties to even.
inline void store(float* p, vf v) {
    std::memcpy(p, &v, sizeof v);
}
inline void store(double* p, vd v) {
    std::memcpy(p, &v, sizeof v);
}
inline void store(bf16* p, vf v) {
#if defined(__AVX512BF16__)
    // The instruction takes subnormal numbers for zero.
    constexpr int kSubnormal = 0x20;
    if (__builtin_expect(_mm512_fpclass_ps_mask(bit_cast<__m512>(v), kSubnormal) == 0, 1)) {
        const __m256bh h = _mm512_cvtneps_pbh(bit_cast<__m512>(v));
        std::memcpy(p, &h, sizeof h);
        return;
    }
#endif
    using bits = VecOf<float>::bits;
    const bits u = bit_cast<bits>(v);
    const bits rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    const bits quiet = (u >> 16) | 0x40u;
    const VecOf<float>::mask is_nan = v != v;
    const bits nan = bit_cast<bits>(is_nan);
    const auto h = __builtin_convertvector((rounded & ~nan) | (quiet & nan), VecOf<float>::half);
    std::memcpy(p, &h, sizeof h);
}
inline void store(f16* p, vf v) {
#if defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(bit_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm256_cvtps_ph(bit_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
    for (int i = 0; i < lanes<float>; ++i) p[i] = from_compute<f16>(v[i]);
#endif
}

// A store that does not bring the line into the caches, where the processor has one. p is a multiple of the
// stored bytes.
template <class T>
inline void store_past_caches(T* p, vec<compute_t<T>> v) {
    T rounded[lanes<compute_t<T>>];
    store(rounded, v);
#if defined(__SSE2__)
    constexpr int size = sizeof rounded;
    if constexpr (size == 16) {
        _mm_stream_si128(reinterpret_cast<__m128i*>(p), bit_cast<__m128i>(rounded));
        return;
    }
#if defined(__AVX2__)
    if constexpr (size == 32) {
        _mm256_stream_si256(reinterpret_cast<__m256i*>(p), bit_cast<__m256i>(rounded));
        return;
    }
#endif
#if defined(__AVX512F__)
    if constexpr (size == 64) {
        _mm512_stream_si512(reinterpret_cast<__m512i*>(p), bit_cast<__m512i>(rounded));
        return;
    }
#endif
#endif
    std::memcpy(p, rounded, sizeof rounded);
}
// Makes what this thread has stored past the caches visible before what it stores next.
inline void end_stream() {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

// The first n lanes from memory, the others zero. Not inlined: copies of these loops at every tail were a
// seventh of the time that the extension takes to compile.
template <class T>
__attribute__((noinline)) vec<compute_t<T>> load_first(const T* p, int64_t n) {
    T buffer[lanes<compute_t<T>>] = {};
    for (int64_t i = 0; i < n; ++i) buffer[i] = p[i];
    return load(buffer);
}
template <class T>
__attribute__((noinline)) void store_first(T* p, vec<compute_t<T>> v, int64_t n) {
    T buffer[lanes<compute_t<T>>];
    store(buffer, v);
    for (int64_t i = 0; i < n; ++i) p[i] = buffer[i];
}

template <class C>
inline vec<C> select(typename VecOf<C>::mask m, vec<C> yes, vec<C> no) {
    using M = typename VecOf<C>::mask;
    return bit_cast<vec<C>>((bit_cast<M>(yes) & m) | (bit_cast<M>(no) & ~m));
}
template <class C>
inline vec<C> max(vec<C> a, vec<C> b) {
    return select<C>(a > b, a, b);
}

template <class C>
inline C sum_lanes(vec<C> v) {
    C s[lanes<C>];
    std::memcpy(s, &v, sizeof v);
    for (int step = lanes<C> / 2; step > 0; step /= 2)
        for (int i = 0; i < step; ++i) s[i] += s[i + step];
    return s[0];
}
template <class C>
inline C max_lanes(vec<C> v) {
    C m = v[0];
    for (int i = 1; i < lanes<C>; ++i) m = v[i] > m ? v[i] : m;
    return m;
}

// e^x to about one unit in the last place; 0 below -87.3, infinity above 88.7, NaN kept.
inline vf exp(vf x) {
    using M = VecOf<float>::mask;
    const M low = x < -87.33654f, high = x > 88.72283f;
    const vf clamped = select<float>(low, splat(-87.33654f), select<float>(high, splat(88.72283f), x));
    const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
    const vf shifted = clamped * 1.44269504f + magic;
    const vf n = shifted - magic;
    const vf r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
    vf p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    // 2^n in two factors, because n reaches 128.
    const M exponent = bit_cast<M>(shifted) - bit_cast<M>(magic);
    const M half = exponent >> 1;
    const vf result = p * bit_cast<vf>((half + 127) << 23) * bit_cast<vf>((exponent - half + 127) << 23);
    return select<float>(low, vf{}, select<float>(high, splat(HUGE_VALF), result));
}
inline vd exp(vd x) {
    for (int i = 0; i < lanes<double>; ++i) x[i] = std::exp(x[i]);
    return x;
}

}  // namespace ttt::TTT_ISA
