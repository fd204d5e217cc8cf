// Attention over a sliding window, backward. With P = e^(scores - lse) computed again and D = rowsum(dO * O):
//     dP = dO V^T    dS = P * (dP - D)    dQ = scale dS K    dK = scale dS^T Q    dV = P^T dO
// A task has the queries of a chunk and goes once through the keys that they see. It owns its dQ; its share
// of dK and dV is added, a block of keys at a time, in the order of the chunks, so that every sum is in the
// same order for any number of threads.
#include <sched.h>

#include "common/parallel.h"
#include "cpu/kernels.h"
#include "cpu/swa_pack.h"

namespace ttt::TTT_ISA {
namespace {

using namespace swa;

template <class T, class C = compute_t<T>>
struct Call {
    Sizes s;
    Tensor<T> d_o, q, k, v, o;
    const C* lse;
    T* dq;
    C *dk, *dv;
    int64_t key_start;
    C scale;

    bool wants_keys() const { return dk || dv; }
};

// How far each chunk of a group has come in adding to dK and dV. Tasks are handed out chunk after chunk, so
// that the one waited for is always being worked on or done.
class Turns {
  public:
    Turns(int64_t groups, int64_t chunks)
        : chunks_(chunks), scratch_(groups * chunks), next_(scratch_.take(0)) {
        fill<int64_t>(next_, groups * chunks, 0);
    }

    // Returns when the chunks before have added to all keys before `key`.
    void wait(int64_t group, int64_t chunk, int64_t key) const {
        if (chunk == 0) return;
        while (__atomic_load_n(next_ + group * chunks_ + chunk - 1, __ATOMIC_ACQUIRE) < key) sched_yield();
    }
    // Says that this chunk, and those before, will not add to keys before `key` any more.
    void done(int64_t group, int64_t chunk, int64_t key) {
        __atomic_store_n(next_ + group * chunks_ + chunk, key, __ATOMIC_RELEASE);
    }

  private:
    int64_t chunks_;
    Scratch<int64_t> scratch_;
    int64_t* next_;
};

// A task's query rows and their gradient, as attend() of the forward pass has them.
template <class T, class C = compute_t<T>>
struct Rows {
    Scratch<C> scratch;
    C *q, *q_panels, *d_o, *do_panels, *dq, *lse, *delta;

    static int64_t elements(int64_t padded, int64_t D) { return padded * (3 * row_stride<C>(D) + 2 * D + 2); }
    Rows(const Call<T>& c, const Queries& queries, int64_t padded)
        : scratch(elements(padded, c.s.D)),
          q(scratch.take(padded * row_stride<C>(c.s.D))),
          q_panels(scratch.take(padded * c.s.D)),
          d_o(scratch.take(padded * row_stride<C>(c.s.D))),
          do_panels(scratch.take(padded * c.s.D)),
          dq(scratch.take(padded * row_stride<C>(c.s.D))),
          lse(scratch.take(padded)),
          delta(scratch.take(padded)) {
        const Sizes& s = c.s;
        const int64_t stride = row_stride<C>(s.D);
        pack_queries(c.q, queries, s.D, c.scale * kUnit<C>, q, q_panels);
        pack_queries(c.d_o, queries, s.D, C(1), d_o, do_panels);
        fill(dq, padded * stride, C(0));
        fill(lse, padded, C(0));
        fill(delta, padded, C(0));
        for (int64_t r = 0; r < queries.rows(); ++r) {
            const int64_t position = queries.position(r), head = queries.head(r);
            const C value = c.lse[(queries.b * s.H + head) * s.Tq + position];
            // A row without keys has the lse -inf, from which its scores of -inf would differ by NaN.
            lse[r] = value == C(-INFINITY) ? C(0) : value * kUnit<C>;
            delta[r] = dot(c.o.at(queries.b, position, head), d_o + r * stride, s.D);
        }
    }

    static C dot(const T* a, const C* b, int64_t n) {
        constexpr int L = lanes<C>;
        vec<C> sum{};
        int64_t i = 0;
        for (; i + L <= n; i += L) sum += load(a + i) * load(b + i);
        if (i < n) sum += load_first(a + i, n - i) * load(b + i);
        return sum_lanes<C>(sum);
    }
};

// Scores become P, and dP becomes dS, for the queries from column 0 to `columns`.
template <class C>
void differentiate(C* scores, C* d_p, int64_t keys, int64_t columns, const C* lse, const C* delta) {
    for (int64_t c = 0; c < columns; c += lanes<C>) {
        const vec<C> l = load(lse + c), d = load(delta + c);
        for (int64_t i = c; i < keys * kQueries; i += kQueries) {
            const vec<C> p = power(load(scores + i) - l);
            store(scores + i, p);
            store(d_p + i, p * (load(d_p + i) - d));
        }
    }
}

// to (D) += from * factor
template <class C>
void add_row(const C* from, C factor, int64_t D, C* to) {
    constexpr int L = lanes<C>;
    int64_t d = 0;
    for (; d + L <= D; d += L) store(to + d, load(to + d) + load(from + d) * factor);
    for (; d < D; ++d) to[d] += from[d] * factor;
}

template <class T, class C = compute_t<T>>
void task(const Call<T>& c, const Keys<C>& keys, Range groups, int64_t group, int64_t chunk, Turns& turns) {
    constexpr int N = kColumns<C>;
    const Sizes& s = c.s;
    const Queries queries = s.queries(groups.begin + group, chunk);
    const int64_t rows = queries.rows(), padded = round_up(rows, kQueries), D = s.D,
                  stride = row_stride<C>(D);
    const Rows<T> r(c, queries, padded);
    Scratch<C> scratch(2 * kKeys * (kQueries + stride));
    C* scores = scratch.take(kKeys * kQueries);
    C* d_p = scratch.take(kKeys * kQueries);
    C* dk = scratch.take(kKeys * stride);
    C* dv = scratch.take(kKeys * stride);
    const Range range = queries.keys();
    for (int64_t origin = round_down(range.begin, kKeys); origin < range.end; origin += kKeys) {
        const Range block{origin, origin + kKeys};
        const Range wanted = block & Range{c.key_start, s.Tk};
        const bool for_keys = c.wants_keys() && !wanted.empty();
        if (!for_keys && !c.dq) continue;
        fill(dk, kKeys * stride, C(0));
        fill(dv, kKeys * stride, C(0));
        for (int64_t row = 0; row < rows; row += kQueries) {
            const Range some{row, least(row + kQueries, rows)};
            Range seen = queries.keys(some) & block;
            if (seen.empty()) continue;
            seen = {round_down(seen.begin, kRows), round_up(seen.end, kRows)};
            const int64_t columns = round_up(some.size(), N), in_block = (seen.begin - origin) * stride;
            multiply<C, false, false>(keys.k(group, seen.begin), stride, r.q_panels + row * D, N, N * D,
                                      seen.size(), columns, D, scores, kQueries);
            multiply<C, false, false>(keys.v(group, seen.begin), stride, r.do_panels + row * D, N, N * D,
                                      seen.size(), columns, D, d_p, kQueries);
            hide(queries, some, seen, seen, scores);
            differentiate(scores, d_p, seen.size(), columns, r.lse + row, r.delta + row);
            if (c.dq)
                multiply<C, true, true>(d_p, kQueries, keys.k(group, seen.begin), stride, N, some.size(), D,
                                        seen.size(), r.dq + row * stride, stride);
            if (for_keys && c.dk)
                multiply<C, false, true>(d_p, kQueries, r.q + row * stride, stride, N, seen.size(), D,
                                         some.size(), dk + in_block, stride);
            if (for_keys && c.dv)
                multiply<C, false, true>(scores, kQueries, r.d_o + row * stride, stride, N, seen.size(), D,
                                         some.size(), dv + in_block, stride);
        }
        if (!for_keys) continue;
        turns.wait(group, chunk, block.end);
        for (int64_t key = wanted.begin; key < wanted.end; ++key) {
            const int64_t out =
                ((queries.b * (s.Tk - c.key_start) + key - c.key_start) * s.Hk + queries.kv_head) * D;
            if (c.dk) add_row(dk + (key - origin) * stride, C(1) / kUnit<C>, D, c.dk + out);
            if (c.dv) add_row(dv + (key - origin) * stride, C(1), D, c.dv + out);
        }
        turns.done(group, chunk, block.end);
    }
    turns.wait(group, chunk, s.Tk);
    turns.done(group, chunk, round_up(s.Tk, kKeys));
    if (!c.dq) return;
    for (int64_t row = 0; row < rows; ++row) {
        T* to = c.dq + ((queries.b * s.Tq + queries.position(row)) * s.H + queries.head(row)) * D;
        narrow_row(r.dq + row * stride, D, c.scale, to);
    }
}

template <class T, class C = compute_t<T>>
void backward(const Call<T>& c) {
    const int64_t chunks = c.s.chunks();
    with_packed(c.s, c.k, c.v, [&](Range groups, const Keys<C>& keys) {
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
                  const void* o, int64_t o_b, int64_t o_t, int64_t o_h, const void* lse, void* dq, void* dk,
                  void* dv, int64_t B, int64_t Tq, int64_t Tk, int64_t H, int64_t Hk, int64_t D,
                  int64_t key_start, double scale) {
    dispatch(dtype, [&](auto element) {
        using T = decltype(element);
        using C = compute_t<T>;
        backward<T>({{B, Tq, Tk, H, Hk, D, first, first_b},
                     {static_cast<const T*>(d_o), do_b, do_t, do_h},
                     {static_cast<const T*>(q), q_b, q_t, q_h},
                     {static_cast<const T*>(k), k_b, k_t, k_h},
                     {static_cast<const T*>(v), v_b, v_t, v_h},
                     {static_cast<const T*>(o), o_b, o_t, o_h},
                     static_cast<const C*>(lse),
                     static_cast<T*>(dq),
                     static_cast<C*>(dk),
                     static_cast<C*>(dv),
                     key_start,
                     static_cast<C>(scale)});
    });
}

}  // namespace ttt::TTT_ISA
