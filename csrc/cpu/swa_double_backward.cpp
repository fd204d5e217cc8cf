// Attention over a sliding window, backward of the backward: given the cotangents A, B, C of dQ, dK, dV, with
// P and D as in the backward pass,
//     S' = s (A K^T + Q B^T)    r = rowsum(P * S')
//     M  = (P * (S' - n)) V + P C    O' = M - (r - n) O    E = rowsum(dO * O') = rowsum(dO * M) - D (r - n)
//     P' = P * (S' - r)    T = P * ((S' - r) * (dP - D) + dO C^T - E)
//     Q' = s (dS B + T K)    K' = s (dS^T A + T^T Q)    V' = P'^T dO
// where n is 0, or r where S' have more in common than they differ (as where keys have something in common):
// the difference of rounded terms would lose that. A task has the queries of a chunk and goes twice through
// the keys that they see: first for r, E and O', its cotangent of dO, which is also the derivative of the
// output along (A, B, C); then for the others. It shares its part of K' and V' as the backward pass does.
//
// Where O and O' have both been given to somebody, both have cotangents, X and dO: then X V^T - rowsum(X * O)
// joins what stands beside S' in T, P^T X joins V', and those of A, B and C, which are what the backward pass
// gives for dO, cost a product each. Whoever has been given O' has r, too, so that no first sweep is needed.
#include <algorithm>

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
    Source<C> k, v, a, b, c, x;
    // O' and what it lost to rounding, or nothing before they are known; r (B, H, Tq), read with them and
    // written without.
    Source<C> tangent, tangent_rest;
    C* r;
    int64_t key_start;
    Sink<C> do_bar, do_rest, q_bar;
    KeySum<C> k_bar, v_bar;
    Sink<C> dq;
    KeySum<C> dk, dv;

    bool second_sweep() const { return q_bar || k_bar || v_bar || dq || dk || dv; }
};

enum Tensors { kK, kV, kB, kC };

// The tiles of a block of keys and kQueries query rows, keys down and queries across.
template <class C>
struct Tiles {
    C *p, *s1, *d_p, *g;

    static constexpr int64_t kElements = kKeys * kQueries;
    explicit Tiles(Scratch<C>& scratch)
        : p(scratch.take(kElements)),
          s1(scratch.take(kElements)),
          d_p(scratch.take(kElements)),
          g(scratch.take(kElements)) {}
};

// A row's r - n, and the sum of P * (S' - n)^2, whose difference from (r - n)^2 is how far S' spreads about
// r.
template <class C>
struct Moments {
    C *r, *square;
};

// Takes one tile of the first sweep: p becomes P, s1 becomes P * (S' - n), and the moments grow.
template <class C>
void summarize(const Tiles<C>& t, int64_t keys, int64_t columns, const C* lse, const C* near, Moments<C> m) {
    for (int64_t c = 0; c < columns; c += lanes<C>) {
        const vec<C> l = load(lse + c), n = load(near + c);
        vec<C> sum{}, square{};
        for (int64_t i = c; i < keys * kQueries; i += kQueries) {
            const vec<C> p = weight<C>(load(t.p + i), l), s = load(t.s1 + i) - n, ps = p * s;
            sum += ps;
            square += ps * s;
            store(t.p + i, p);
            store(t.s1 + i, ps);
        }
        store(m.r + c, load(m.r + c) + sum);
        store(m.square + c, load(m.square + c) + square);
    }
}

// Takes one tile of the second sweep: p becomes P, s1 becomes P', d_p becomes dS, and g becomes T.
template <class C>
void differentiate(const Tiles<C>& t, int64_t keys, int64_t columns, const C* lse, const C* delta, const C* r,
                   const C* e) {
    for (int64_t c = 0; c < columns; c += lanes<C>) {
        const vec<C> l = load(lse + c), d = load(delta + c), of_r = load(r + c), of_e = load(e + c);
        for (int64_t i = c; i < keys * kQueries; i += kQueries) {
            const vec<C> p = weight<C>(load(t.p + i), l), s = load(t.s1 + i) - of_r,
                         difference = load(t.d_p + i) - d;
            store(t.g + i, p * (s * difference + load(t.g + i) - of_e));
            store(t.d_p + i, p * difference);
            store(t.s1 + i, p * s);
            store(t.p + i, p);
        }
    }
}

template <class C>
struct Task {
    Task(const Call<C>& call, const Keys<C>& packed, const Queries& own, int64_t index)
        : c(call),
          keys(packed),
          queries(own),
          group(index),
          rows(queries.rows()),
          padded(round_up(rows, kQueries)),
          D(c.s.D),
          stride(row_stride<C>(D)),
          scratch(GradientRows<C>::elements(padded, D) + padded * (4 * stride + 2 * D + 4) +
                  4 * Tiles<C>::kElements + 4 * kKeys * stride),
          of(c.outcome, c.s, queries, scratch),
          a(scratch.take(padded * stride)),
          x(scratch.take(padded * stride)),
          sum(scratch.take(padded * stride)),
          dq_sum(scratch.take(padded * stride)),
          a_panels(scratch.take(padded * D)),
          x_panels(scratch.take(padded * D)),
          r(scratch.take(padded)),
          e(scratch.take(padded)),
          square(scratch.take(padded)),
          near(scratch.take(padded)),
          tiles(scratch),
          k_sum(scratch.take(kKeys * stride)),
          v_sum(scratch.take(kKeys * stride)),
          dk_sum(scratch.take(kKeys * stride)),
          dv_sum(scratch.take(kKeys * stride)) {
        if (c.a) pack_queries(c.a, queries, D, c.outcome.scale, a, a_panels);
        if (c.x) pack_queries(c.x, queries, D, C(1), x, x_panels);
        fill(e, padded, C(0));
        fill(near, padded, C(0));
    }

    // r, E (with X's part) and O'.
    void first_sweep() {
        summarize_keys();
        if (common()) {
            for (int64_t row = 0; row < padded; ++row) near[row] = r[row];
            summarize_keys();
        }
        Scratch<C> memory(2 * stride);
        C *o = memory.take(stride), *spare = memory.take(stride);
        for (int64_t row = 0; row < rows; ++row) {
            const int64_t position = queries.position(row), head = queries.head(row);
            C* m = sum + row * stride;
            e[row] = dot(m, of.d_o + row * stride, D) - of.delta[row] * r[row];
            if (c.do_bar) {
                c.outcome.read(queries.b, position, head, D, r[row], o, spare);
                for (int64_t d = 0; d < D; d += lanes<C>) store(m + d, load(m + d) - load(o + d));
                c.do_bar.write(queries.b, position, head, m, C(1));
                if (c.do_rest) c.do_rest.write_rest(queries.b, position, head, m, C(1));
            }
            if (c.x) {
                c.outcome.read(queries.b, position, head, D, C(1), o, spare);
                e[row] += dot(x + row * stride, o, D);
            }
            r[row] += near[row];
            if (c.r) c.r[statistic(position, head)] = r[row];
        }
    }

    // r and E of what the first sweep of another call found.
    void recall() {
        Scratch<C> memory(2 * stride);
        C *o = memory.take(stride), *spare = memory.take(stride);
        for (int64_t row = 0; row < rows; ++row) {
            const int64_t position = queries.position(row), head = queries.head(row);
            r[row] = c.r[statistic(position, head)];
            read_whole(c.tangent, c.tangent_rest, queries.b, position, head, D, C(1), o, spare);
            e[row] = dot(of.d_o + row * stride, o, D);
            if (c.x) {
                c.outcome.read(queries.b, position, head, D, C(1), o, spare);
                e[row] += dot(x + row * stride, o, D);
            }
        }
    }

    // Where a number of a row is in (B, H, Tq).
    int64_t statistic(int64_t position, int64_t head) const {
        return (queries.b * c.s.H + head) * c.s.Tq + position;
    }

    // r - n and M.
    void summarize_keys() {
        fill(sum, padded * stride, C(0));
        fill(r, padded, C(0));
        fill(square, padded, C(0));
        const Range range = queries.keys();
        for (int64_t origin = round_down(range.begin, kKeys); origin < range.end; origin += kKeys) {
            for (int64_t row = 0; row < rows; row += kQueries) {
                const Range some = rows_from(row), seen = seen_by(some, origin);
                if (seen.empty()) continue;
                fill_weights(some, seen);
                summarize(tiles, seen.size(), columns(some), of.lse + row, near + row,
                          {r + row, square + row});
                add_rows(tiles.s1, kV, some, seen, sum);
                if (given(c.c, seen)) add_rows(tiles.p, kC, some, seen, sum);
            }
        }
    }

    // Whether S' of the rows have more in common, their r, than twice their spread about it.
    bool common() const {
        C shared(0), spread(0);
        for (int64_t row = 0; row < rows; ++row) {
            shared += r[row] * r[row];
            spread += std::max(C(0), square[row] - r[row] * r[row]);
        }
        return shared > 4 * spread;
    }

    // Q', K' and V', and dQ, dK and dV.
    void second_sweep(int64_t chunk, Turns& turns) {
        const Range range = queries.keys();
        fill(sum, padded * stride, C(0));
        fill(dq_sum, padded * stride, C(0));
        for (int64_t origin = round_down(range.begin, kKeys); origin < range.end; origin += kKeys) {
            const Range block{origin, origin + kKeys}, wanted = block & Range{0, c.s.Tk},
                                                       own = block & Range{c.key_start, c.s.Tk};
            for (C* of_keys : {k_sum, v_sum, dk_sum, dv_sum}) fill(of_keys, kKeys * stride, C(0));
            for (int64_t row = 0; row < rows; row += kQueries) {
                const Range some = rows_from(row), seen = seen_by(some, origin);
                if (seen.empty()) continue;
                fill_weights(some, seen);
                fill_gradients(some, seen);
                differentiate(tiles, seen.size(), columns(some), of.lse + row, of.delta + row, r + row,
                              e + row);
                if (c.q_bar) {
                    add_rows(tiles.g, kK, some, seen, sum);
                    if (given(c.b, seen)) add_rows(tiles.d_p, kB, some, seen, sum);
                }
                if (c.k_bar) {
                    add_keys(tiles.g, of.q, some, seen, origin, k_sum);
                    if (c.a) add_keys(tiles.d_p, a, some, seen, origin, k_sum);
                }
                if (c.v_bar) {
                    add_keys(tiles.s1, of.d_o, some, seen, origin, v_sum);
                    if (c.x) add_keys(tiles.p, x, some, seen, origin, v_sum);
                }
                if (c.dq) add_rows(tiles.d_p, kK, some, seen, dq_sum);
                if (c.dk && !own.empty()) add_keys(tiles.d_p, of.q, some, seen, origin, dk_sum);
                if (c.dv && !own.empty()) add_keys(tiles.p, of.d_o, some, seen, origin, dv_sum);
            }
            if (!c.k_bar && !c.v_bar && !c.dk && !c.dv) continue;
            turns.wait(group, chunk, block.end);
            c.k_bar.add(c.s, queries, block, wanted, k_sum);
            c.v_bar.add(c.s, queries, block, wanted, v_sum);
            c.dk.add(c.s, queries, block, own, dk_sum);
            c.dv.add(c.s, queries, block, own, dv_sum);
            turns.done(group, chunk, block.end);
        }
        turns.wait(group, chunk, c.s.Tk);
        turns.done(group, chunk, round_up(c.s.Tk, kKeys));
        if (c.q_bar) write_rows(c.q_bar, sum);
        if (c.dq) write_rows(c.dq, dq_sum);
    }

    void write_rows(const Sink<C>& to, const C* values) const {
        for (int64_t row = 0; row < rows; ++row)
            to.write(queries.b, queries.position(row), queries.head(row), values + row * stride,
                     c.outcome.scale);
    }

    static constexpr int N = kColumns<C>;

    Range rows_from(int64_t row) const { return {row, least(row + kQueries, rows)}; }
    static int64_t columns(Range some) { return round_up(some.size(), N); }
    // The keys of a block that some of the rows see, in whole register tiles.
    Range seen_by(Range some, int64_t origin) const {
        const Range seen = queries.keys(some) & Range{origin, origin + kKeys};
        if (seen.empty()) return seen;
        return {round_down(seen.begin, kRows), round_up(seen.end, kRows)};
    }

    // Whether B or C has other rows than zeros for some of these keys.
    bool given(const Source<C>& tensor, Range seen) const { return tensor && seen.end > c.key_start; }

    // out (keys, kQueries) = [out +] rows of keys times the transpose of rows of queries.
    template <bool kAdd>
    void product(int64_t tensor, const C* panels, Range some, Range seen, C* out) const {
        multiply<C, false, kAdd>(keys.at(tensor, group, seen.begin), stride, panels + some.begin * D, N,
                                 N * D, seen.size(), columns(some), D, out, kQueries);
    }

    // Scores less what is hidden, and S'.
    void fill_weights(Range some, Range seen) const {
        product<false>(kK, of.q_panels, some, seen, tiles.p);
        hide(queries, some, seen, seen, tiles.p);
        const bool b = given(c.b, seen);
        if (c.a) product<false>(kK, a_panels, some, seen, tiles.s1);
        if (c.a && b) product<true>(kB, of.q_panels, some, seen, tiles.s1);
        if (!c.a && b) product<false>(kB, of.q_panels, some, seen, tiles.s1);
        if (!c.a && !b) fill(tiles.s1, seen.size() * kQueries, C(0));
    }

    // dP and dO C^T + X V^T.
    void fill_gradients(Range some, Range seen) const {
        product<false>(kV, of.do_panels, some, seen, tiles.d_p);
        const bool by_c = given(c.c, seen);
        if (by_c) product<false>(kC, of.do_panels, some, seen, tiles.g);
        if (by_c && c.x) product<true>(kV, x_panels, some, seen, tiles.g);
        if (!by_c && c.x) product<false>(kV, x_panels, some, seen, tiles.g);
        if (!by_c && !c.x) fill(tiles.g, seen.size() * kQueries, C(0));
    }

    // The rows' sums in `out` += transpose of a tile times rows of keys.
    void add_rows(const C* tile, int64_t tensor, Range some, Range seen, C* out) const {
        multiply<C, true, true>(tile, kQueries, keys.at(tensor, group, seen.begin), stride, N, some.size(), D,
                                seen.size(), out + some.begin * stride, stride);
    }

    // A block's sums += a tile times rows of queries.
    void add_keys(const C* tile, const C* of_rows, Range some, Range seen, int64_t origin, C* out) const {
        multiply<C, false, true>(tile, kQueries, of_rows + some.begin * stride, stride, N, seen.size(), D,
                                 some.size(), out + (seen.begin - origin) * stride, stride);
    }

    const Call<C>& c;
    const Keys<C>& keys;
    const Queries queries;
    const int64_t group, rows, padded, D, stride;
    Scratch<C> scratch;
    const GradientRows<C> of;
    C *a, *x, *sum, *dq_sum, *a_panels, *x_panels, *r, *e, *square, *near;
    const Tiles<C> tiles;
    C *k_sum, *v_sum, *dk_sum, *dv_sum;
};

template <class C>
void double_backward(const Call<C>& c) {
    const int64_t chunks = c.s.chunks();
    const KeySource<C> sources[] = {{c.k}, {c.v}, {c.b, c.key_start}, {c.c, c.key_start}};
    with_packed<C>(c.s, sources, [&](Range groups, const Keys<C>& keys) {
        Turns turns(groups.size(), chunks);
        parallel_tasks(groups.size() * chunks, [&](int64_t index, int) {
            const int64_t group = index % groups.size(), chunk = index / groups.size();
            Task<C> task(c, keys, c.s.queries(groups.begin + group, chunk), group);
            if (c.tangent) {
                task.recall();
            } else {
                task.first_sweep();
            }
            if (c.second_sweep()) task.second_sweep(chunk, turns);
        });
    });
}

}  // namespace

void swa_double_backward(Dtype dtype, const void* a, int64_t a_b, int64_t a_t, int64_t a_h, const void* b,
                         int64_t b_b, int64_t b_t, int64_t b_h, const void* c, int64_t c_b, int64_t c_t,
                         int64_t c_h, const void* x, int64_t x_b, int64_t x_t, int64_t x_h, const void* d_o,
                         int64_t do_b, int64_t do_t, int64_t do_h, const void* q, int64_t q_b, int64_t q_t,
                         int64_t q_h, const void* k, int64_t k_b, int64_t k_t, int64_t k_h, const void* v,
                         int64_t v_b, int64_t v_t, int64_t v_h, const int64_t* first, int64_t first_b,
                         const void* o, int64_t o_b, int64_t o_t, int64_t o_h, const void* o_rest,
                         int64_t rest_b, int64_t rest_t, int64_t rest_h, const void* tangent,
                         int64_t tangent_b, int64_t tangent_t, int64_t tangent_h, const void* tangent_rest,
                         int64_t tr_b, int64_t tr_t, int64_t tr_h, const void* lse, void* r, void* do_bar,
                         void* do_rest, void* q_bar, void* k_bar, void* v_bar, void* dq, void* dk, void* dv,
                         int64_t B, int64_t Tq, int64_t Tk, int64_t H, int64_t Hk, int64_t D,
                         int64_t key_start, double scale) {
    dispatch(dtype, [&](auto element) {
        using T = decltype(element);
        using C = compute_t<T>;
        const auto tensor = [](const void* data, int64_t of_b, int64_t of_t, int64_t of_h) {
            return Tensor<T>{static_cast<const T*>(data), of_b, of_t, of_h};
        };
        double_backward<C>(
            {{B, Tq, Tk, H, Hk, D, first, first_b},
             {tensor(q, q_b, q_t, q_h), tensor(d_o, do_b, do_t, do_h), tensor(o, o_b, o_t, o_h),
              tensor(o_rest, rest_b, rest_t, rest_h), static_cast<const C*>(lse), static_cast<C>(scale)},
             tensor(k, k_b, k_t, k_h),
             tensor(v, v_b, v_t, v_h),
             tensor(a, a_b, a_t, a_h),
             tensor(b, b_b, b_t, b_h),
             tensor(c, c_b, c_t, c_h),
             tensor(x, x_b, x_t, x_h),
             tensor(tangent, tangent_b, tangent_t, tangent_h),
             tensor(tangent_rest, tr_b, tr_t, tr_h),
             static_cast<C*>(r),
             key_start,
             {static_cast<T*>(do_bar), Tq, H, D},
             {static_cast<T*>(do_rest), Tq, H, D},
             {static_cast<T*>(q_bar), Tq, H, D},
             {static_cast<C*>(k_bar), 0},
             {static_cast<C*>(v_bar), 0},
             {static_cast<T*>(dq), Tq, H, D},
             {static_cast<C*>(dk), key_start},
             {static_cast<C*>(dv), key_start}});
    });
}

}  // namespace ttt::TTT_ISA
