// Rows in pieces of 16 bytes, which stay packed until they are computed with: apart, each small element would
// take a register. And eight neighbouring elements, of which a thread has its own where rows are short.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "common/decode_math.h"

namespace ttt::cuda {
namespace {

constexpr int kChunk = 16;
template <class T>
constexpr int kElements = kChunk / static_cast<int>(sizeof(T));

// Elements 2 i and 2 i + 1 of a word of two.
template <class T>
__device__ inline void widen_pair(unsigned word, float* wide) {
    if constexpr (std::is_same_v<T, bf16>) {
        wide[0] = bit_cast<float>(word << 16);
        wide[1] = bit_cast<float>(word & 0xffff0000u);
    } else {
        wide[0] = to_compute(T{static_cast<uint16_t>(word & 0xffffu)});
        wide[1] = to_compute(T{static_cast<uint16_t>(word >> 16)});
    }
}
template <class T>
__device__ inline unsigned narrow_pair(const float* wide) {
    return from_compute<T>(wide[0]).bits | static_cast<unsigned>(from_compute<T>(wide[1]).bits) << 16;
}

__device__ inline uint2 lower(const uint4& chunk) {
    return make_uint2(chunk.x, chunk.y);
}
__device__ inline uint2 upper(const uint4& chunk) {
    return make_uint2(chunk.z, chunk.w);
}

template <class T>
__device__ inline void widen_half(const uint2& half, float* wide) {
    if constexpr (std::is_same_v<T, float>) {
        wide[0] = bit_cast<float>(half.x);
        wide[1] = bit_cast<float>(half.y);
    } else {
        widen_pair<T>(half.x, wide);
        widen_pair<T>(half.y, wide + 2);
    }
}
template <class T>
__device__ inline void widen_chunk(const uint4& chunk, float* wide) {
    widen_half<T>(lower(chunk), wide);
    widen_half<T>(upper(chunk), wide + kElements<T> / 2);
}
template <class T>
__device__ inline uint4 narrow_chunk(const float* wide) {
    if constexpr (std::is_same_v<T, float>)
        return make_uint4(bit_cast<unsigned>(wide[0]), bit_cast<unsigned>(wide[1]),
                          bit_cast<unsigned>(wide[2]), bit_cast<unsigned>(wide[3]));
    else
        return make_uint4(narrow_pair<T>(wide), narrow_pair<T>(wide + 2), narrow_pair<T>(wide + 4),
                          narrow_pair<T>(wide + 6));
}

constexpr int kOctet = 8;
template <class T>
struct Octet {
    uint4 chunks[kOctet / kElements<T>];
};

// Where memory is read: shared, or what other blocks have written, or what nobody reads again soon.
enum Access { kShared, kWritten, kStreamed };

// At a multiple of 16 bytes.
template <Access kAccess, class T>
__device__ inline Octet<T> load_octet(const T* p) {
    Octet<T> v;
#pragma unroll
    for (int i = 0; i < kOctet / kElements<T>; ++i) {
        const uint4* from = reinterpret_cast<const uint4*>(p) + i;
        v.chunks[i] = kAccess == kShared ? *from : kAccess == kWritten ? __ldcg(from) : __ldcs(from);
    }
    return v;
}
template <class T>
__device__ inline void store_octet(T* p, const Octet<T>& v) {
#pragma unroll
    for (int i = 0; i < kOctet / kElements<T>; ++i) reinterpret_cast<uint4*>(p)[i] = v.chunks[i];
}

template <class T>
__device__ inline void widen(const Octet<T>& v, float (&wide)[kOctet]) {
#pragma unroll
    for (int i = 0; i < kOctet / kElements<T>; ++i) widen_chunk<T>(v.chunks[i], wide + i * kElements<T>);
}
template <class T>
__device__ inline Octet<T> narrow(const float (&wide)[kOctet]) {
    Octet<T> v;
#pragma unroll
    for (int i = 0; i < kOctet / kElements<T>; ++i) v.chunks[i] = narrow_chunk<T>(wide + i * kElements<T>);
    return v;
}

}  // namespace
}  // namespace ttt::cuda
