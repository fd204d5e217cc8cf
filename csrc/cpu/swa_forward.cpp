// Attention over a sliding window, forward: O = softmax(scale Q K^T) V with an online softmax over blocks of
// keys; blocks that no query of a task sees are not visited.
#include "common/parallel.h"
#include "cpu/kernels.h"
#include "cpu/swa_few.h"
#include "cpu/swa_pack.h"

namespace ttt::TTT_ISA {
namespace {

using namespace swa;

// A call without this many tasks shares out the keys of its queries too, in a number of parts that does not
// depend on the number of threads, so that the result does not either.
constexpr int64_t kEnoughTasks = 16;
constexpr int64_t kKeysOfPart = 512;

template <class C>
struct Call {
    Sizes s;
    Source<C> q, k, v;
    Sink<C> o, o_rest;
    C* lse;
    C scale;
};

// A tile of scores becomes weights: for the queries from column 0 to `columns` and `keys` rows.
template <class C>
void soften(C* tile, int64_t keys, int64_t columns, int64_t row, Running<C>& run) {
    constexpr int L = lanes<C>;
    for (int64_t c = 0; c < columns; c += L) {
        C* column = tile + c;
        vec<C> top[4];
        for (vec<C>& t : top) t = load(column);
        for (int64_t j = 0; j < keys; j += kRows)
            for (int i = 0; i < kRows; ++i)
                top[i % 4] = max<C>(load(column + (j + i) * kQueries), top[i % 4]);
        run.raise(row + c, max<C>(max<C>(top[0], top[1]), max<C>(top[2], top[3])));
        const vec<C> m = run.finite_maximum(row + c);
        vec<C> even{}, odd{};
        for (int64_t j = 0; j < keys; j += 2) {
            const vec<C> w0 = exponential(load(column + j * kQueries) - m);
            const vec<C> w1 = exponential(load(column + (j + 1) * kQueries) - m);
            store(column + j * kQueries, w0);
            store(column + (j + 1) * kQueries, w1);
            even += w0;
            odd += w1;
        }
        store(run.l + row + c, load(run.l + row + c) + (even + odd));
    }
}

// Takes the rows of a task over the keys `range` of a packed group, block by block.
template <class C>
void attend(const Call<C>& c, const Queries& queries, const Keys<C>& keys, int64_t group, Range range,
            Running<C>& run) {
    const int64_t rows = queries.rows(), padded = round_up(rows, kQueries), D = c.s.D,
                  stride = row_stride<C>(D);
    Scratch<C> scratch(padded * stride + padded * D + kKeys * kQueries);
    C* q = scratch.take(padded * stride);
    C* panels = scratch.take(padded * D);
    C* tile = scratch.take(kKeys * kQueries);
    run.reset();
    pack_queries(c.q, queries, D, c.scale, q, panels);
    for (int64_t origin = round_down(range.begin, kKeys); origin < range.end; origin += kKeys) {
        const Range block{origin, origin + kKeys};
        for (int64_t row = 0; row < rows; row += kQueries) {
            const Range some{row, least(row + kQueries, rows)};
            Range seen = queries.keys(some) & range & block;
            if (seen.empty()) continue;
            seen = {round_down(seen.begin, kRows), round_up(seen.end, kRows)};
            const int64_t columns = round_up(some.size(), kColumns<C>);
            multiply<C, false, false>(keys.at(0, group, seen.begin), stride, panels + row * D, kColumns<C>,
                                      kColumns<C> * D, seen.size(), columns, D, tile, kQueries);
            hide(queries, some, seen, range, tile);
            soften(tile, seen.size(), columns, row, run);
            multiply<C, true, true>(tile, kQueries, keys.at(1, group, seen.begin), stride, kColumns<C>,
                                    some.size(), D, seen.size(), run.o + row * stride, stride);
        }
    }
}

// Writes o, what it loses to rounding, and lse of a task's rows.
template <class C>
void finish(const Call<C>& c, const Queries& queries, const Running<C>& run) {
    const Sizes& s = c.s;
    for (int64_t r = 0; r < queries.rows(); ++r) {
        const int64_t position = queries.position(r), head = queries.head(r);
        const C inverse = run.l[r] == C(0) ? C(0) : C(1) / run.l[r];
        const C* row = run.o + r * run.stride;
        c.o.write(queries.b, position, head, row, inverse);
        if (c.o_rest) c.o_rest.write_rest(queries.b, position, head, row, inverse);
        c.lse[(queries.b * s.H + head) * s.Tq + position] = run.m[r] + std::log(run.l[r]);
    }
}

// Runs the tasks of some groups; attend(queries, group, range, run) takes a task's rows over a range of keys.
template <class C, class F>
void run_groups(const Call<C>& c, Range groups, F&& attend) {
    const Sizes& s = c.s;
    const int64_t chunks = s.chunks(), tasks = groups.size() * chunks;
    const int64_t parts = most(1, least(kEnoughTasks / tasks, s.Tk / kKeysOfPart));
    const int64_t state_size = Running<C>::elements(s.most_rows(), s.D);
    // The last chunks see the most keys: they come first, so that no thread is left with one at the end.
    const auto queries_of = [&](int64_t task) {
        return s.queries(groups.begin + task % groups.size(), chunks - 1 - task / groups.size());
    };
    if (parts == 1) {
        parallel_tasks(tasks, [&](int64_t task, int) {
            const Queries queries = queries_of(task);
            Scratch<C> state(state_size);
            Running<C> run(state.take(0), queries.rows(), s.D);
            attend(queries, task % groups.size(), queries.keys(), run);
            finish(c, queries, run);
        });
        return;
    }
    Scratch<C> states(tasks * parts * state_size);
    C* memory = states.take(0);
    const auto state_of = [&](int64_t task, int64_t part) {
        return Running<C>(memory + (task * parts + part) * state_size, queries_of(task).rows(), s.D);
    };
    parallel_tasks(tasks * parts, [&](int64_t job, int) {
        const int64_t task = job / parts, part = job % parts;
        const Queries queries = queries_of(task);
        const Range keys = queries.keys();
        const int64_t size = most(0, keys.size());
        Running<C> run = state_of(task, part);
        attend(queries, task % groups.size(),
               Range{keys.begin + size * part / parts, keys.begin + size * (part + 1) / parts}, run);
    });
    parallel_tasks(tasks, [&](int64_t task, int) {
        const Queries queries = queries_of(task);
        Running<C> run = state_of(task, 0);
        for (int64_t part = 1; part < parts; ++part) run.join(state_of(task, part), queries.rows());
        finish(c, queries, run);
    });
}

template <class C>
void forward(const Call<C>& c) {
    with_packed<C>(c.s, {{c.k}, {c.v}}, [&](Range groups, const Keys<C>& keys) {
        run_groups(c, groups, [&](const Queries& queries, int64_t group, Range range, Running<C>& run) {
            attend(c, queries, keys, group, range, run);
        });
    });
}

}  // namespace

void swa_forward(Dtype dtype, const void* q, int64_t q_b, int64_t q_t, int64_t q_h, const void* k,
                 int64_t k_b, int64_t k_t, int64_t k_h, const void* v, int64_t v_b, int64_t v_t, int64_t v_h,
                 const int64_t* first, int64_t first_b, void* o, void* o_rest, void* lse, int64_t B,
                 int64_t Tq, int64_t Tk, int64_t H, int64_t Hk, int64_t D, double scale) {
    dispatch(dtype, [&](auto element) {
        using T = decltype(element);
        using C = compute_t<T>;
        const Tensor<T> queries{static_cast<const T*>(q), q_b, q_t, q_h},
            keys{static_cast<const T*>(k), k_b, k_t, k_h}, values{static_cast<const T*>(v), v_b, v_t, v_h};
        const Call<C> c{{B, Tq, Tk, H, Hk, D, first, first_b},
                        queries,
                        keys,
                        values,
                        {static_cast<T*>(o), Tq, H, D},
                        {static_cast<T*>(o_rest), Tq, H, D},
                        static_cast<C*>(lse),
                        static_cast<C>(scale)};
        if (c.s.most_rows() > kFewRows) return forward(c);
        const Range all{0, c.s.groups()};
        run_groups(c, all, [&](const Queries& rows, int64_t, Range range, Running<C>& run) {
            attend_few(queries, keys, values, c.scale, D, rows, range, run);
        });
    });
}

}  // namespace ttt::TTT_ISA
