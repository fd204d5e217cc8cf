// Vectors with tails, and what the formulas of common/decode_math.h are made of.
#pragma once

#include "common/vec.h"

namespace ttt::TTT_ISA {

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

}  // namespace ttt::TTT_ISA
