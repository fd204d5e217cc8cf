// Attention over a sliding window, backward. With P = e^(scores - lse) computed again and D = rowsum(dO * O):
//     dP = dO V^T    dS = P * (dP - D)    dQ = scale dS K    dK = scale dS^T Q    dV = P^T dO
// A task has the queries of a chunk and goes once through the keys that they see. It owns its dQ; its share
// of dK and dV is added, a block of keys at a time, in the order of the chunks, so that every sum is in the
// same order for any number of threads.
#include "common/parallel.h"
#include "cpu/kernels.h"
#include "cpu/swa_gradient.h"
#include "cpu/swa_turns.h"

namespace ttt::TTT_ISA {
namespace {

using namespace swa;

template <class C>
struct Call {
    Sizes s;
    Outcome<C> outcome;
    Source<C> k, v;
    Sink<C> dq;
    KeySum<C> dk, dv;
    int64_t key_start;
};

// Scores become P, and dP becomes dS, for the queries from column 0 to `columns`.
template <class C>
void differentiate(C* scores, C* d_p, int64_t keys, int64_t columns, const C* lse, const C* delta) {
    for (int64_t c = 0; c < columns; c += lanes<C>) {
        const vec<C> l = load(lse + c), d = load(delta + c);
        for (int64_t i = c; i < keys * kQueries; i += kQueries) {
            const vec<C> p = weight<C>(load(scores + i), l);
            store(scores + i, p);
            store(d_p + i, p * (load(d_p + i) - d));
        }
    }
}

template <class C>
void task(const Call<C>& c, const Keys<C>& keys, Range groups, int64_t group, int64_t chunk, Turns& turns) {
    constexpr int N = kColumns<C>;
    const Sizes& s = c.s;
    const Queries queries = s.queries(groups.begin + group, chunk);
    const int64_t rows = queries.rows(), padded = round_up(rows, kQueries), D = s.D,
                  stride = row_stride<C>(D);
    Scratch<C> scratch(GradientRows<C>::elements(padded, D) + padded * stride +
                       2 * kKeys * (kQueries + stride));
    const GradientRows<C> r(c.outcome, s, queries, scratch);
    C* dq = scratch.take(padded * stride);
    C* scores = scratch.take(kKeys * kQueries);
    C* d_p = scratch.take(kKeys * kQueries);
    C* dk = scratch.take(kKeys * stride);
    C* dv = scratch.take(kKeys * stride);
    fill(dq, padded * stride, C(0));
    const Range range = queries.keys();
    for (int64_t origin = round_down(range.begin, kKeys); origin < range.end; origin += kKeys) {
        const Range block{origin, origin + kKeys}, wanted = block & Range{c.key_start, s.Tk};
        const bool for_keys = (c.dk || c.dv) && !wanted.empty();
        if (!for_keys && !c.dq) continue;
        fill(dk, kKeys * stride, C(0));
        fill(dv, kKeys * stride, C(0));
        for (int64_t row = 0; row < rows; row += kQueries) {
            const Range some{row, least(row + kQueries, rows)};
            Range seen = queries.keys(some) & block;
            if (seen.empty()) continue;
            seen = {round_down(seen.begin, kRows), round_up(seen.end, kRows)};
            const int64_t columns = round_up(some.size(), N), in_block = (seen.begin - origin) * stride;
            multiply<C, false, false>(keys.at(0, group, seen.begin), stride, r.q_panels + row * D, N, N * D,
                                      seen.size(), columns, D, scores, kQueries);
            multiply<C, false, false>(keys.at(1, group, seen.begin), stride, r.do_panels + row * D, N, N * D,
                                      seen.size(), columns, D, d_p, kQueries);
            hide(queries, some, seen, seen, scores);
            differentiate(scores, d_p, seen.size(), columns, r.lse + row, r.delta + row);
            if (c.dq)
                multiply<C, true, true>(d_p, kQueries, keys.at(0, group, seen.begin), stride, N, some.size(),
                                        D, seen.size(), dq + row * stride, stride);
            if (for_keys && c.dk)
                multiply<C, false, true>(d_p, kQueries, r.q + row * stride, stride, N, seen.size(), D,
                                         some.size(), dk + in_block, stride);
            if (for_keys && c.dv)
                multiply<C, false, true>(scores, kQueries, r.d_o + row * stride, stride, N, seen.size(), D,
                                         some.size(), dv + in_block, stride);
        }
        if (!for_keys) continue;
        turns.wait(group, chunk, block.end);
        c.dk.add(s, queries, block, wanted, dk);
        c.dv.add(s, queries, block, wanted, dv);
        turns.done(group, chunk, block.end);
    }
    turns.wait(group, chunk, s.Tk);
    turns.done(group, chunk, round_up(s.Tk, kKeys));
    if (!c.dq) return;
    for (int64_t row = 0; row < rows; ++row)
        c.dq.write(queries.b, queries.position(row), queries.head(row), dq + row * stride, c.outcome.scale);
}

template <class C>
void backward(const Call<C>& c) {
    const int64_t chunks = c.s.chunks();
    with_packed<C>(c.s, {{c.k}, {c.v}}, [&](Range groups, const Keys<C>& keys) {
        Turns turns(groups.size(), chunks);
        parallel_tasks(groups.size() * chunks, [&](int64_t index, int) {
            task(c, keys, groups, index % groups.size(), index / groups.size(), turns);
        });
    });
}

}  // namespace

void swa_backward(Dtype dtype, const void* d_o, int64_t do_b, int64_t do_t, int64_t do_h, const void* q,
                  int64_t q_b, int64_t q_t, int64_t q_h, const void* k, int64_t k_b, int64_t k_t, int64_t k_h,
                  const void* v, int64_t v_b, int64_t v_t, int64_t v_h, const int64_t* first, int64_t first_b,
                  const void* o, int64_t o_b, int64_t o_t, int64_t o_h, const void* o_rest, int64_t rest_b,
                  int64_t rest_t, int64_t rest_h, const void* lse, void* dq, void* dk, void* dv, int64_t B,
                  int64_t Tq, int64_t Tk, int64_t H, int64_t Hk, int64_t D, int64_t key_start, double scale) {
    dispatch(dtype, [&](auto element) {
        using T = decltype(element);
        using C = compute_t<T>;
        backward<C>({{B, Tq, Tk, H, Hk, D, first, first_b},
                     {Tensor<T>{static_cast<const T*>(q), q_b, q_t, q_h},
                      Tensor<T>{static_cast<const T*>(d_o), do_b, do_t, do_h},
                      Tensor<T>{static_cast<const T*>(o), o_b, o_t, o_h},
                      Tensor<T>{static_cast<const T*>(o_rest), rest_b, rest_t, rest_h},
                      static_cast<const C*>(lse), static_cast<C>(scale)},
                     Tensor<T>{static_cast<const T*>(k), k_b, k_t, k_h},
                     Tensor<T>{static_cast<const T*>(v), v_b, v_t, v_h},
                     {static_cast<T*>(dq), Tq, H, D},
                     {static_cast<C*>(dk), key_start},
                     {static_cast<C*>(dv), key_start},
                     key_start});
    });
}

}  // namespace ttt::TTT_ISA
