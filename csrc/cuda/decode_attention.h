// Attention of one query of a head over some of its keys, by a block.
#pragma once

#include <cmath>

#include "common/decode_math.h"
#include "cuda/decode_octet.h"
#include "cuda/decode_weights.h"

namespace ttt::cuda {
namespace {

// Blocks that the keys of one sequence are divided among, about as many as a large GPU has: it must not
// depend on the GPU, because the order of sums does.
constexpr int kBlocksOfSequence = 128;
constexpr int kMostPieces = 16;
constexpr int kLeastKeys = 192;

// The most pieces that the keys of a head are cut into.
__host__ __device__ inline int most_pieces(int heads) {
    const int even = divide_up(kBlocksOfSequence, heads);
    return even < kMostPieces ? even : kMostPieces;
}
// How many keys a piece has.
__device__ inline int keys_per_piece(int keys, int heads) {
    return divide_up(divide_up(keys, most_pieces(heads)), kLeastKeys) * kLeastKeys;
}

// What a piece leaves: the largest score, and the sum of exponentials relative to it.
using Softmax = float2;

// Floats of shared memory that a block needs for one piece: the query, and what the warps leave.
__host__ __device__ constexpr int attention_floats(int head_dim) {
    return head_dim + kWarps * (head_dim + 2);
}

// One head's rms_norm, then its rotation, rounded to T after each, by one warp: element 8 lane and the
// following are a lane's.
template <class T, class Out>
__device__ inline void normalize_and_rotate(const T* x, const float* weight, const float* cos,
                                            const float* sin, int head_dim, float eps, Out* out) {
    const int i = static_cast<int>(threadIdx.x) % kWarp * kOctet;
    const bool own = i < head_dim;
    float v[kOctet] = {}, squares = 0;
    if (own) widen(load_octet<kWritten>(x + i), v);
#pragma unroll
    for (int e = 0; e < kOctet; ++e) squares = multiply_add(v[e], v[e], squares);
    const float r = inverse_rms(warp_reduce(squares, Sum{}), head_dim, eps);
    if (!own) return;
#pragma unroll
    for (int e = 0; e < kOctet; e += 2) {
        float a = normalized<T>(v[e], r, weight[i + e]), b = normalized<T>(v[e + 1], r, weight[i + e + 1]);
        rotate(a, b, cos[(i + e) / 2], sin[(i + e) / 2]);
        v[e] = rounded<T>(a);
        v[e + 1] = rounded<T>(b);
    }
    store_octet(out + i, narrow<Out>(v));
}

// A lane's part of softmax and of the values that it weighs: elements of a head that begin with an octet.
struct Weighted {
    float largest = -HUGE_VALF, total = 0;
    float values[kOctet] = {};

    // Makes what was summed relative to a score that is at least as large.
    __device__ void rescale(float now) {
        const float left = shrinkage(largest, now);
        largest = now;
        total *= left;
#pragma unroll
        for (int e = 0; e < kOctet; ++e) values[e] *= left;
    }
};

// A warp's keys of a piece, `lanes` lanes for each: those of the lanes `group` are `apart` apart, `first`
// being the first. `key` is a head's first element of the piece's first key.
template <class T>
struct Keys {
    const T* key;
    const T* value;
    int64_t key_stride, value_stride;
    int count;
};

template <class T>
__device__ inline Weighted attend(const Keys<T>& keys, const float* query, int head_dim, float scale,
                                  int lanes, int first, int apart) {
    // So many keys and values are read before the first is used. The warps of a block take turns at that.
    constexpr int kKeys = 8 / static_cast<int>(sizeof(T));
    const int i = static_cast<int>(threadIdx.x) % lanes * kOctet;
    const bool own = i < head_dim;
    float q[kOctet] = {};
    if (own)
#pragma unroll
        for (int e = 0; e < kOctet; ++e) q[e] = query[i + e];
    Weighted sum;
    const T* key = keys.key + first * keys.key_stride + i;
    const T* value = keys.value + first * keys.value_stride + i;
    const int64_t key_step = apart * keys.key_stride, value_step = apart * keys.value_stride;
    // All lanes of the warp take part in every turn, with keys or without.
    const int turns = divide_up(keys.count, kKeys * apart);
    int left = keys.count - first;
#pragma unroll 1
    for (int turn = 0; turn < turns; ++turn, left -= kKeys * apart) {
        Octet<T> k[kKeys], v[kKeys];
#pragma unroll
        for (int u = 0; u < kKeys; ++u, key += key_step, value += value_step) {
            k[u] = v[u] = Octet<T>{};
            if (own && u * apart < left) {
                k[u] = load_octet<kStreamed>(key);
                v[u] = load_octet<kStreamed>(value);
            }
        }
        float scores[kKeys] = {};
#pragma unroll
        for (int u = 0; u < kKeys; ++u) {
            float wide[kOctet];
            widen(k[u], wide);
#pragma unroll
            for (int e = 0; e < kOctet; ++e) scores[u] = multiply_add(wide[e], q[e], scores[u]);
        }
        // All keys at every step: one's next step waits for its last.
#pragma unroll 1
        for (int step = lanes / 2; step > 0; step /= 2)
#pragma unroll
            for (int u = 0; u < kKeys; ++u) scores[u] += __shfl_xor_sync(kWholeWarp, scores[u], step);
        float now = sum.largest;
#pragma unroll
        for (int u = 0; u < kKeys; ++u)
            if (u * apart < left && scores[u] * scale > now) now = scores[u] * scale;
        sum.rescale(now);
#pragma unroll
        for (int u = 0; u < kKeys; ++u) {
            if (u * apart >= left) continue;
            const float p = softmax_weight(scores[u], scale, now);
            float wide[kOctet];
            widen(v[u], wide);
            sum.total += p;
#pragma unroll
            for (int e = 0; e < kOctet; ++e) sum.values[e] = multiply_add(p, wide[e], sum.values[e]);
        }
    }
    return sum;
}

// Joins what the groups of `lanes` lanes have: the first group has it all.
__device__ inline void join_groups(Weighted& own, int lanes) {
#pragma unroll 1
    for (int step = lanes; step < kWarp; step *= 2) {
        Weighted other;
        other.largest = __shfl_xor_sync(kWholeWarp, own.largest, step);
        other.total = __shfl_xor_sync(kWholeWarp, own.total, step);
#pragma unroll
        for (int e = 0; e < kOctet; ++e) other.values[e] = __shfl_xor_sync(kWholeWarp, own.values[e], step);
        const float now = other.largest > own.largest ? other.largest : own.largest;
        const float left = shrinkage(other.largest, now);
        own.rescale(now);
        own.total = multiply_add(left, other.total, own.total);
#pragma unroll
        for (int e = 0; e < kOctet; ++e) own.values[e] = multiply_add(left, other.values[e], own.values[e]);
    }
}

// One piece, by a whole block: its softmax, and the head's values (D) weighted by it. The query (D) is in
// `shared`, which all threads may read, in front of what the warps leave.
template <class T>
__device__ inline void attend_piece(const Keys<T>& keys, int head_dim, float scale, float* shared,
                                    Softmax* softmax, float* values) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
    int lanes = 1;
    while (lanes * kOctet < head_dim) lanes *= 2;
    const int groups = kWarp / lanes;
    Weighted own =
        attend(keys, shared, head_dim, scale, lanes, warp * groups + lane / lanes, kWarps * groups);
    join_groups(own, lanes);
    float* const of_warps = shared + head_dim;
    float* const softmax_of_warps = of_warps + kWarps * head_dim;
    if (lane * kOctet < head_dim)
#pragma unroll
        for (int e = 0; e < kOctet; ++e) of_warps[warp * head_dim + lane * kOctet + e] = own.values[e];
    if (lane == 0) {
        softmax_of_warps[2 * warp] = own.largest;
        softmax_of_warps[2 * warp + 1] = own.total;
    }
    Together{}();
    // Every lane has the factor of one warp.
    const float largest = lane < kWarps ? softmax_of_warps[2 * lane] : -HUGE_VALF;
    const float now = warp_reduce(largest, Max{});
    const float left = shrinkage(largest, now);
    const int i = static_cast<int>(threadIdx.x);
    float total = 0, value = 0;
#pragma unroll 4
    for (int w = 0; w < kWarps; ++w) {
        const float factor = __shfl_sync(kWholeWarp, left, w);
        total = multiply_add(factor, softmax_of_warps[2 * w + 1], total);
        if (i < head_dim) value = multiply_add(factor, of_warps[w * head_dim + i], value);
    }
    if (i < head_dim) values[i] = value;
    if (i == 0) *softmax = make_float2(now, total);
}

}  // namespace
}  // namespace ttt::cuda
