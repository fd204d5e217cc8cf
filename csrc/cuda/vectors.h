// Neighbouring elements that a thread reads or writes at once, 8 or 16 bytes of them.
#pragma once

#include <cuda_runtime.h>

#include "common/scalar.h"

namespace ttt::cuda {

template <class T, int L>
struct Vector {
    T x[L];
};

template <int kBytes>
struct Words;
template <>
struct Words<8> {
    using type = uint2;
};
template <>
struct Words<16> {
    using type = uint4;
};
template <class T, int L>
using words_t = typename Words<L* static_cast<int>(sizeof(T))>::type;

// Whether vectors of L elements can be read from this element on, a vector apart from each other.
template <int L, class T>
__device__ inline bool aligned(const T* p) {
    return reinterpret_cast<uintptr_t>(p) % (L * sizeof(T)) == 0;
}

// Of what is read again soon, and of what is not: the caches give that up first.
template <int L, class T>
__device__ inline Vector<T, L> load(const T* p) {
    return bit_cast<Vector<T, L>>(__ldca(reinterpret_cast<const words_t<T, L>*>(p)));
}
template <int L, class T>
__device__ inline Vector<T, L> load_once(const T* p) {
    return bit_cast<Vector<T, L>>(__ldcs(reinterpret_cast<const words_t<T, L>*>(p)));
}
template <int L, class T>
__device__ inline void store(T* p, const Vector<T, L>& v) {
    __stwb(reinterpret_cast<words_t<T, L>*>(p), bit_cast<words_t<T, L>>(v));
}
template <int L, class T>
__device__ inline void store_once(T* p, const Vector<T, L>& v) {
    __stcs(reinterpret_cast<words_t<T, L>*>(p), bit_cast<words_t<T, L>>(v));
}

// The first n of L elements one by one, wherever they are, with zeros for the others.
template <int L, class T>
__device__ inline Vector<T, L> load_first(const T* p, int n) {
    Vector<T, L> v;
#pragma unroll
    for (int i = 0; i < L; ++i) v.x[i] = i < n ? p[i] : T{};
    return v;
}
template <int L, class T>
__device__ inline void store_first(T* p, const Vector<T, L>& v, int n) {
#pragma unroll
    for (int i = 0; i < L; ++i)
        if (i < n) p[i] = v.x[i];
}

}  // namespace ttt::cuda
