// Attention of one query per head over a cache, in pieces of keys that workers share.
#pragma once

#include <type_traits>

#include "common/vec.h"
#include "cpu/decode_product.h"
#include "cpu/decode_rows.h"

namespace ttt::TTT_ISA {
namespace {

// Keys whose scores are held at once: enough for streams of some length.
constexpr int64_t kTile = 128;
constexpr int64_t kMostPieces = 64;
constexpr int64_t kLeastKeys = 32;

// How many keys a piece has: it depends on their number only, so that results depend on nothing else.
inline int64_t keys_per_piece(int64_t keys) {
    const int64_t even = (keys + kMostPieces - 1) / kMostPieces;
    return (even + kLeastKeys - 1) / kLeastKeys * kLeastKeys;
}

template <class T>
struct Keys {
    const T* k;
    const T* v;
    int64_t k_stride, v_stride, count;
};

// What pieces leave for one sequence: for each head and piece the largest score and the sum of exponentials
// relative to it, (H, pieces), and for each piece the values so weighted, (pieces, H, D).
struct Partial {
    float* largest;
    float* total;
    float* values;
    int64_t pieces;
};

// Folds the scores (n) of one tile into the running maximum and sum, and turns them into exponentials.
inline void rescale(float* scores, int64_t n, float scale, float* largest, float* total, float* acc,
                    int64_t head_dim) {
    for (int64_t j = n; j % kLanes; ++j) scores[j] = -HUGE_VALF;
    vf top = splat(*largest);
    for (int64_t j = 0; j < n; j += kLanes) top = max<float>(load(scores + j) * scale, top);
    const float now = max_lanes<float>(top);
    const float shrink = shrinkage(*largest, now);
    vf sum{};
    for (int64_t j = 0; j < n; j += kLanes) {
        const vf e = softmax_weight(load(scores + j), splat(scale), splat(now));
        store(scores + j, e);
        sum += e;
    }
    *total = multiply_add(*total, shrink, sum_lanes<float>(sum));
    *largest = now;
    if (shrink != 1.0f)
        for (int64_t i = 0; i < head_dim; ++i) acc[i] *= shrink;
}

// acc (D) += sum over S values, v_apart apart, of p * v, their weights p_apart apart.
template <int S, class T>
inline void add_values(const float* p, int64_t p_apart, const T* v, int64_t v_apart, float* acc,
                       int64_t head_dim) {
    const auto add = [&](int64_t i, auto&& fetch) {
        vf sum = fetch(acc + i);
        for (int s = 0; s < S; ++s) sum += p[s * p_apart] * fetch(v + s * v_apart + i);
        return sum;
    };
    int64_t i = 0;
    for (; i + kLanes <= head_dim; i += kLanes) store(acc + i, add(i, [](const auto* x) { return load(x); }));
    const int64_t left = head_dim - i;
    if (left) store_first(acc + i, add(i, [&](const auto* x) { return load_first(x, left); }), left);
}

// Calls f(first key, how far to the next, how many: kStreams or 1) until all n keys of a tile have had their
// turn. Memory is read along several streams here too.
template <class F>
inline void each_keys(int64_t n, F&& f) {
    const int64_t run = n / kStreams;
    for (int64_t j = 0; j < run; ++j) f(j, run, std::integral_constant<int, kStreams>{});
    for (int64_t j = kStreams * run; j < n; ++j) f(j, run, std::integral_constant<int, 1>{});
}

// q (H, D) over the keys of piece `piece`; scores: scratch (H, kTile).
template <class T>
inline void attend_piece(const float* q, Keys<T> keys, int64_t heads, int64_t head_dim, float scale,
                         float* scores, const Partial& partial, int64_t piece) {
    float* values = partial.values + piece * heads * head_dim;
    for (int64_t i = 0; i < heads * head_dim; ++i) values[i] = 0.0f;
    for (int64_t h = 0; h < heads; ++h) {
        partial.largest[h * partial.pieces + piece] = -HUGE_VALF;
        partial.total[h * partial.pieces + piece] = 0.0f;
    }
    for (int64_t first = 0; first < keys.count; first += kTile) {
        const int64_t n = keys.count - first < kTile ? keys.count - first : kTile;
        each_keys(n, [&](int64_t j, int64_t apart, auto streams) {
            const T* k = keys.k + (first + j) * keys.k_stride;
            for (int64_t h = 0; h < heads; ++h)
                dots<streams, 1>(k + h * head_dim, apart * keys.k_stride, q + h * head_dim, 0, head_dim,
                                 scores + h * kTile + j, apart, 0);
        });
        for (int64_t h = 0; h < heads; ++h) {
            const int64_t i = h * partial.pieces + piece;
            rescale(scores + h * kTile, n, scale, partial.largest + i, partial.total + i,
                    values + h * head_dim, head_dim);
        }
        each_keys(n, [&](int64_t j, int64_t apart, auto streams) {
            const T* v = keys.v + (first + j) * keys.v_stride;
            for (int64_t h = 0; h < heads; ++h)
                add_values<streams>(scores + h * kTile + j, apart, v + h * head_dim, apart * keys.v_stride,
                                    values + h * head_dim, head_dim);
        });
    }
}

// out (D) of one head from what its pieces left, in their order.
template <class T>
inline void join_pieces(const Partial& partial, int64_t h, int64_t heads, int64_t head_dim, T* out) {
    const float* largest = partial.largest + h * partial.pieces;
    const float* total = partial.total + h * partial.pieces;
    float factor[kMostPieces], top = largest[0], sum = 0.0f;
    for (int64_t p = 1; p < partial.pieces; ++p) top = largest[p] > top ? largest[p] : top;
    for (int64_t p = 0; p < partial.pieces; p += kLanes)
        store_upto(factor + p, exp(load_upto(largest + p, partial.pieces - p) - top), partial.pieces - p);
    for (int64_t p = 0; p < partial.pieces; ++p) sum = multiply_add(factor[p], total[p], sum);
    for (int64_t i = 0; i < head_dim; i += kLanes) {
        const float* values = partial.values + h * head_dim + i;
        vf mean{};
        for (int64_t p = 0; p < partial.pieces; ++p)
            mean =
                multiply_add(splat(factor[p]), load_upto(values + p * heads * head_dim, head_dim - i), mean);
        store_upto(out + i, mean / sum, head_dim - i);
    }
}

}  // namespace
}  // namespace ttt::TTT_ISA
