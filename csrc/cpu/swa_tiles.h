// Arithmetic of the attention kernels: products of small tiles, and exponentials.
//
// Scores stand transposed, keys down and queries across: then keys and values are read as they are stored,
// only the queries of a task are transposed, once, and a vector holds the statistics of as many queries.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/vec.h"

namespace ttt::TTT_ISA::swa {

// A register tile is kRows x kColumns: as many accumulators as leave registers for the operands (12 of the 16
// that AVX2 has, 24 of the 32 of AVX-512).
constexpr int kRows = kVectorBytes == 64 ? 12 : 6;
template <class C>
constexpr int kColumns = 2 * lanes<C>;

// A tile of scores is kKeys x kQueries: whole register tiles in both directions, and small enough to stay in
// the first-level cache between the products.
constexpr int kKeys = 96;
constexpr int kQueries = kVectorBytes == 64 ? 96 : 48;

inline int64_t round_up(int64_t n, int64_t multiple) {
    return (n + multiple - 1) / multiple * multiple;
}
inline int64_t round_down(int64_t n, int64_t multiple) {
    return n / multiple * multiple;
}
inline int64_t least(int64_t a, int64_t b) {
    return a < b ? a : b;
}
inline int64_t most(int64_t a, int64_t b) {
    return a > b ? a : b;
}

// Elements from one row of D to the next: whole register tiles, and no power of two, which would map every
// row to the same few cache sets.
template <class C>
inline int64_t row_stride(int64_t D) {
    return round_up(D, kColumns<C>) + kColumns<C>;
}

// e^x for x up to 88; 0 below -87.7, NaN kept. As 2^(x log2 e), whose fraction r has the polynomial of degree
// 6 with the least relative error on [-1/2, 1/2], 2e-9. To about one unit in the last place near 0; rounding
// of log2 e adds a fifth of a unit for each unit of x, where the result is small, and without fused
// multiply-adds that of x log2 e up to one more.
inline vf exponential(vf x) {
    const vf floor = splat(-88.02969f), log2e = splat(1.44269504f);
    x = select<float>(x < floor, floor, x);
    const vf magic = splat(12583039.0f);  // 1.5 * 2^23 + 127: leaves the biased exponent in the low bits
    const vf shifted = x * log2e + magic;
    const vf r = x * log2e - (shifted - magic);
    vf p = splat(1.535336205e-4f);
    p = p * r + 1.339887452e-3f;
    p = p * r + 9.618437358e-3f;
    p = p * r + 5.550332471e-2f;
    p = p * r + 2.402264791e-1f;
    p = p * r + 6.931472029e-1f;
    p = p * r + 1.0f;
    return p * bit_cast<vf>(bit_cast<VecOf<float>::bits>(shifted) << 23);
}
inline vd exponential(vd x) {
    return exp(x);
}
inline float exponential(float x) {
    return std::exp(x);
}
inline double exponential(double x) {
    return std::exp(x);
}

// out (kRows, kColumns) = [out +] a b, a (kRows, depth), b (depth, kColumns). a is addressed
// a[row * a_stride + i], or where kTransposed a[i * a_stride + row]. What is added is summed by itself first,
// so that a long sum of products is one of short sums, which rounds less.
template <class C, bool kTransposed, bool kAdd>
inline void multiply_tile(const C* a, int64_t a_stride, const C* b, int64_t b_stride, int64_t depth, C* out,
                          int64_t out_stride) {
    constexpr int L = lanes<C>;
    vec<C> left[kRows], right[kRows];
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
        left[r] = vec<C>{};
        right[r] = vec<C>{};
    }
    for (int64_t i = 0; i < depth; ++i) {
        const vec<C> b_left = load(b), b_right = load(b + L);
#pragma GCC unroll 12
        for (int r = 0; r < kRows; ++r) {
            const vec<C> x = splat(kTransposed ? a[r] : a[r * a_stride]);
            left[r] += x * b_left;
            right[r] += x * b_right;
        }
        a += kTransposed ? a_stride : 1;
        b += b_stride;
    }
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r, out += out_stride) {
        store(out, kAdd ? load(out) + left[r] : left[r]);
        store(out + L, kAdd ? load(out + L) + right[r] : right[r]);
    }
}

// out (rows, columns) = [out +] a b, in whole register tiles: rows and columns are rounded up, into memory
// that the caller has there. The columns of b from c on (a multiple of kColumns) start at b + c / kColumns *
// panel.
template <class C, bool kTransposed, bool kAdd>
inline void multiply(const C* a, int64_t a_stride, const C* b, int64_t b_stride, int64_t panel, int64_t rows,
                     int64_t columns, int64_t depth, C* out, int64_t out_stride) {
    for (int64_t c = 0; c < columns; c += kColumns<C>, b += panel, out += kColumns<C>)
        for (int64_t r = 0; r < rows; r += kRows)
            multiply_tile<C, kTransposed, kAdd>(a + (kTransposed ? r : r * a_stride), a_stride, b, b_stride,
                                                depth, out + r * out_stride, out_stride);
}

}  // namespace ttt::TTT_ISA::swa
