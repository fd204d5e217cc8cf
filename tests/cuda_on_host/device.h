// What kernels use of CUDA's language: its keywords, types and built-in functions.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "fibers.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) alignas(bytes)

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

#define CUDA_ON_HOST_VECTORS(T, NAME)                             \
    struct alignas(2 * sizeof(T)) NAME##2 {                       \
        T x, y;                                                   \
    };                                                            \
    struct alignas(sizeof(T) == 8 ? 16 : 4 * sizeof(T)) NAME##4 { \
        T x, y, z, w;                                             \
    };                                                            \
    inline NAME##2 make_##NAME##2(T x, T y) {                     \
        return {x, y};                                            \
    }                                                             \
    inline NAME##4 make_##NAME##4(T x, T y, T z, T w) {           \
        return {x, y, z, w};                                      \
    }
CUDA_ON_HOST_VECTORS(float, float)
CUDA_ON_HOST_VECTORS(double, double)
CUDA_ON_HOST_VECTORS(int, int)
CUDA_ON_HOST_VECTORS(unsigned, uint)
CUDA_ON_HOST_VECTORS(unsigned short, ushort)
#undef CUDA_ON_HOST_VECTORS

namespace cuda_on_host {

template <class T>
uint64_t bits_of(T value) {
    static_assert(sizeof(T) <= 8, "lanes exchange up to 8 bytes");
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    return bits;
}
template <class T>
T take(unsigned mask, T value, unsigned source) {
    Exchange own{bits_of(value), source, 0, 0};
    exchange(mask, own);
    std::memcpy(&value, &own.received, sizeof value);
    return value;
}
inline unsigned vote(unsigned mask, bool value) {
    Exchange own{value, lane(), 0, 0};
    exchange(mask, own);
    return own.votes;
}
// As the hardware, which refuses addresses that are no multiple of what is accessed.
template <class T>
const T* aligned(const T* address) {
    if (reinterpret_cast<uintptr_t>(address) % alignof(T)) fail("a vector is not where its size demands");
    return address;
}

}  // namespace cuda_on_host

inline void __syncthreads() {
    cuda_on_host::wait_for_block(0, 0);
}
inline void __syncwarp(unsigned mask = 0xffffffffu) {
    cuda_on_host::vote(mask, false);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize) {
    const int lane = static_cast<int>(cuda_on_host::lane());
    return cuda_on_host::take(mask, value, static_cast<unsigned>(lane / width * width + source % width));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = warpSize) {
    const int lane = static_cast<int>(cuda_on_host::lane()), other = lane ^ bits;
    return cuda_on_host::take(mask, value,
                              static_cast<unsigned>(other / width > lane / width ? lane : other));
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = warpSize) {
    const int lane = static_cast<int>(cuda_on_host::lane()), other = lane + static_cast<int>(by);
    return cuda_on_host::take(mask, value,
                              static_cast<unsigned>(other / width > lane / width ? lane : other));
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = warpSize) {
    const int lane = static_cast<int>(cuda_on_host::lane()), other = lane - static_cast<int>(by);
    return cuda_on_host::take(mask, value,
                              static_cast<unsigned>(other < lane / width * width ? lane : other));
}
inline unsigned __ballot_sync(unsigned mask, int value) {
    return cuda_on_host::vote(mask, value != 0);
}
inline int __any_sync(unsigned mask, int value) {
    return cuda_on_host::vote(mask, value != 0) != 0;
}
inline int __all_sync(unsigned mask, int value) {
    return cuda_on_host::vote(mask, value == 0) == 0;
}

inline int __ffs(int value) {
    return value ? __builtin_ctz(static_cast<unsigned>(value)) + 1 : 0;
}

inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __nanosleep(unsigned) {
    cuda_on_host::yield();
}

template <class T>
T atomicAdd(T* address, T value) {
    const T before = *address;
    *address = static_cast<T>(before + value);
    return before;
}
template <class T>
T atomicMax(T* address, T value) {
    const T before = *address;
    if (value > before) *address = value;
    return before;
}
template <class T>
T atomicExch(T* address, T value) {
    const T before = *address;
    *address = value;
    return before;
}
template <class T>
T atomicCAS(T* address, T expected, T value) {
    const T before = *address;
    if (before == expected) *address = value;
    return before;
}

// Loads and stores with hints for the caches.
#define CUDA_ON_HOST_LOAD(NAME)                 \
    template <class T>                          \
    T NAME(const T* address) {                  \
        return *cuda_on_host::aligned(address); \
    }
CUDA_ON_HOST_LOAD(__ldg)
CUDA_ON_HOST_LOAD(__ldca)
CUDA_ON_HOST_LOAD(__ldcg)
CUDA_ON_HOST_LOAD(__ldcs)
CUDA_ON_HOST_LOAD(__ldlu)
CUDA_ON_HOST_LOAD(__ldcv)
#undef CUDA_ON_HOST_LOAD
#define CUDA_ON_HOST_STORE(NAME)                                 \
    template <class T>                                           \
    void NAME(T* address, T value) {                             \
        *const_cast<T*>(cuda_on_host::aligned(address)) = value; \
    }
CUDA_ON_HOST_STORE(__stwb)
CUDA_ON_HOST_STORE(__stcg)
CUDA_ON_HOST_STORE(__stcs)
CUDA_ON_HOST_STORE(__stwt)
#undef CUDA_ON_HOST_STORE

inline float rsqrtf(float x) {
    return 1.0f / std::sqrt(x);
}
inline float __expf(float x) {
    return std::exp(x);
}
inline float __fdividef(float x, float y) {
    return x / y;
}
