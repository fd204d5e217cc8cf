// What both backward passes read of the forward pass.
#pragma once

#include "cpu/swa_pack.h"

namespace ttt::TTT_ISA::swa {

// out = a row of a tensor * factor, before rounding where its rest is there; `spare` is as long as out.
template <class C>
inline void read_whole(const Source<C>& from, const Source<C>& rest, int64_t sequence, int64_t position,
                       int64_t head, int64_t D, C factor, C* out, C* spare) {
    from.read(sequence, position, head, D, factor, out);
    if (!rest) return;
    rest.read(sequence, position, head, D, factor, spare);
    for (int64_t d = 0; d < D; d += lanes<C>) store(out + d, load(out + d) + load(spare + d));
}

// Queries, the cotangent and the value of the output, what the value lost to rounding (or nothing), and its
// log-sum-exp (B, H, Tq).
template <class C>
struct Outcome {
    Source<C> q, d_o, o, o_rest;
    const C* lse;
    C scale;

    // out = that row of the output * factor.
    void read(int64_t sequence, int64_t position, int64_t head, int64_t D, C factor, C* out, C* spare) const {
        read_whole(o, o_rest, sequence, position, head, D, factor, out, spare);
    }
};

// The inner product of two rows, which are padded with zeros.
template <class C>
inline C dot(const C* a, const C* b, int64_t D) {
    vec<C> sum{};
    for (int64_t d = 0; d < D; d += lanes<C>) sum += load(a + d) * load(b + d);
    return sum_lanes<C>(sum);
}

// P from a score and its row's lse: at most 1, however far rounding brings scores that are huge above their
// lse.
template <class C>
inline vec<C> weight(vec<C> score, vec<C> lse) {
    const vec<C> x = score - lse, zero{};
    return exponential(select<C>(x > zero, zero, x));
}

// A task's query rows: those of q (times scale) and of d_o, both also as panels; lse and
// delta = rowsum(d_o * o).
template <class C>
struct GradientRows {
    C *q, *q_panels, *d_o, *do_panels, *lse, *delta;

    static int64_t elements(int64_t padded, int64_t D) { return padded * (2 * row_stride<C>(D) + 2 * D + 2); }
    GradientRows(const Outcome<C>& from, const Sizes& s, const Queries& queries, Scratch<C>& scratch) {
        const int64_t D = s.D, stride = row_stride<C>(D), padded = round_up(queries.rows(), kQueries);
        q = scratch.take(padded * stride);
        q_panels = scratch.take(padded * D);
        d_o = scratch.take(padded * stride);
        do_panels = scratch.take(padded * D);
        lse = scratch.take(padded);
        delta = scratch.take(padded);
        pack_queries(from.q, queries, D, from.scale, q, q_panels);
        pack_queries(from.d_o, queries, D, C(1), d_o, do_panels);
        fill(lse, padded, C(0));
        fill(delta, padded, C(0));
        Scratch<C> row(2 * stride);
        C *o = row.take(stride), *spare = row.take(stride);
        for (int64_t r = 0; r < queries.rows(); ++r) {
            const int64_t position = queries.position(r), head = queries.head(r);
            const C value = from.lse[(queries.b * s.H + head) * s.Tq + position];
            // A row without keys has the lse -inf, from which its scores of -inf would differ by NaN.
            lse[r] = value == C(-INFINITY) ? C(0) : value;
            from.read(queries.b, position, head, D, C(1), o, spare);
            delta[r] = dot(o, d_o + r * stride, D);
        }
    }
};

}  // namespace ttt::TTT_ISA::swa
