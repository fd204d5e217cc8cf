// The state of an online softmax, and attention for so few query rows that packing the keys for the products
// of swa_tiles.h would cost more than the products: one pass over keys and values where they are.
#pragma once

#include "cpu/swa_pack.h"

namespace ttt::TTT_ISA::swa {

constexpr int64_t kFewRows = 4;

// Query rows on their way through the keys, with w = e^(score - m) and m the greatest score so far:
// o (rows, D) = sum of w v, l = sum of w.
template <class C>
struct Running {
    C *o, *m, *l;
    int64_t padded, D, stride;

    static int64_t elements(int64_t rows, int64_t D) {
        return round_up(rows, kQueries) * (row_stride<C>(D) + 2);
    }
    Running(C* memory, int64_t rows, int64_t dim)
        : padded(round_up(rows, kQueries)), D(dim), stride(row_stride<C>(dim)) {
        o = memory;
        m = o + padded * stride;
        l = m + padded;
    }

    void reset() {
        fill(o, padded * stride, C(0));
        fill(m, padded, C(-INFINITY));
        fill(l, padded, C(0));
    }

    void rescale(int64_t row, C factor) {
        C* p = o + row * stride;
        for (int64_t d = 0; d < D; d += lanes<C>) store(p + d, load(p + d) * factor);
        l[row] *= factor;
    }

    void raise(int64_t row, C top) {
        if (!(top > m[row])) return;
        rescale(row, exponential(m[row] - top));
        m[row] = top;
    }

    // The same for a vector of rows from `row` on; after the first blocks the maximum seldom moves.
    void raise(int64_t row, vec<C> top) {
        for (int i = 0; i < lanes<C>; ++i) raise(row + i, top[i]);
    }

    // m, or 0 for rows that have seen no key: their scores are -inf, and -inf - -inf would be NaN.
    vec<C> finite_maximum(int64_t row) const {
        const vec<C> top = load(m + row);
        return select<C>(top == splat(C(-INFINITY)), vec<C>{}, top);
    }

    // Adds the state of the same rows over other keys.
    void join(const Running& other, int64_t rows) {
        for (int64_t r = 0; r < rows; ++r) {
            raise(r, other.m[r]);
            if (m[r] == C(-INFINITY)) continue;
            const C factor = exponential(other.m[r] - m[r]);
            C* to = o + r * stride;
            const C* from = other.o + r * stride;
            for (int64_t d = 0; d < D; d += lanes<C>) store(to + d, load(to + d) + load(from + d) * factor);
            l[r] += other.l[r] * factor;
        }
    }
};

// scores[j] = q . k[j] for `keys` of one row.
template <class T, class C = compute_t<T>>
inline void score_row(const C* q, const T* k, int64_t t, Range keys, int64_t D, C* scores) {
    constexpr int L = lanes<C>;
    for (int64_t j = keys.begin; j < keys.end; ++j) {
        const T* key = k + j * t;
        vec<C> even{}, odd{};
        int64_t d = 0;
        for (; d + 2 * L <= D; d += 2 * L) {
            even += load(q + d) * load(key + d);
            odd += load(q + d + L) * load(key + d + L);
        }
        if (d + L <= D) {
            even += load(q + d) * load(key + d);
            d += L;
        }
        if (d < D) odd += load(q + d) * load_first(key + d, D - d);
        scores[j] = sum_lanes<C>(even + odd);
    }
}

// o += sum of weights[j] v[j] over `keys`.
template <class T, class C = compute_t<T>>
inline void add_row(const C* weights, const T* v, int64_t t, Range keys, int64_t D, C* o) {
    constexpr int L = lanes<C>;
    for (int64_t d = 0; d < D; d += L) {
        const int64_t n = least(L, D - d);
        vec<C> even = load(o + d), odd{};
        int64_t j = keys.begin;
        if (n == L) {
            for (; j + 2 <= keys.end; j += 2) {
                even += weights[j] * load(v + j * t + d);
                odd += weights[j + 1] * load(v + (j + 1) * t + d);
            }
        }
        for (; j < keys.end; ++j) even += weights[j] * load_first(v + j * t + d, n);
        store(o + d, even + odd);
    }
}

// Takes the rows of a task over the keys `range`, block by block.
template <class T, class C = compute_t<T>>
inline void attend_few(const Tensor<T>& q, const Tensor<T>& k, const Tensor<T>& v, C scale, int64_t D,
                       const Queries& queries, Range range, Running<C>& run) {
    constexpr int L = lanes<C>;
    const int64_t stride = row_stride<C>(D);
    Scratch<C> scratch(kFewRows * stride + kKeys);
    C* wide = scratch.take(kFewRows * stride);
    C* scores = scratch.take(kKeys);
    run.reset();
    for (int64_t r = 0; r < queries.rows(); ++r)
        widen_row(q.at(queries.b, queries.position(r), queries.head(r)), D, scale, wide + r * stride);
    for (int64_t origin = range.begin; origin < range.end; origin += kKeys) {
        const T* keys = k.at(queries.b, origin, queries.kv_head);
        const T* values = v.at(queries.b, origin, queries.kv_head);
        for (int64_t r = 0; r < queries.rows(); ++r) {
            const Range seen = ((queries.keys({r, r + 1}) & range) - origin) & Range{0, kKeys};
            if (seen.empty()) continue;
            score_row(wide + r * stride, keys, k.t, seen, D, scores);
            fill(scores, seen.begin, C(-INFINITY));
            fill(scores + seen.end, round_up(seen.end, L) - seen.end, C(-INFINITY));
            vec<C> top = load(scores);
            for (int64_t j = L; j < seen.end; j += L) top = max<C>(load(scores + j), top);
            run.raise(r, max_lanes<C>(top));
            const C m = run.finite_maximum(r)[0];
            vec<C> sum{};
            for (int64_t j = 0; j < seen.end; j += L) {
                const vec<C> w = exponential(load(scores + j) - m);
                store(scores + j, w);
                sum += w;
            }
            run.l[r] += sum_lanes<C>(sum);
            add_row(scores, values, v.t, seen, D, run.o + r * stride);
        }
    }
}

}  // namespace ttt::TTT_ISA::swa
