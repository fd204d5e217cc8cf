// Cross-entropy over a vocabulary that is read block by block: the passes over the logits of one block.
#include <cmath>

#include "common/lanes.h"
#include "common/parallel.h"
#include "cpu/kernels.h"

namespace ttt::TTT_ISA {
namespace {

constexpr int64_t kGrain = 16384;

template <class T, class C = compute_t<T>>
C maximum_of(const T* row, int64_t n) {
    constexpr int L = lanes<C>;
    // Four chains hide the latency of compare and select.
    vec<C> m[4];
    for (auto& lane : m) lane = splat(C(-HUGE_VAL));
    int64_t i = 0;
    for (; i + 4 * L <= n; i += 4 * L)
        for (int k = 0; k < 4; ++k) m[k] = max<C>(load(row + i + k * L), m[k]);
    C most = max_lanes<C>(max<C>(max<C>(m[0], m[1]), max<C>(m[2], m[3])));
    for (; i < n; ++i) most = to_compute(row[i]) > most ? to_compute(row[i]) : most;
    return most;
}

// Sum of e^(row - m), which replaces the row where `keep` says so.
template <bool keep, class T, class C = compute_t<T>>
C sum_of_exponentials(T* row, C m, int64_t n) {
    constexpr int L = lanes<C>;
    vec<C> s{};
    int64_t i = 0;
    for (; i + L <= n; i += L) {
        const vec<C> p = exp(load(row + i) - m);
        if constexpr (keep) store(row + i, p);
        s += p;
    }
    C total = sum_lanes<C>(s);
    if (i < n) {
        const vec<C> p = exp(load_first(row + i, n - i) - m);
        if constexpr (keep) store_first(row + i, p, n - i);
        for (int k = 0; k < n - i; ++k) total += p[k];
    }
    return total;
}

template <class C>
void scale(C* a, C factor, int64_t n) {
    for_each_vector<C>(0, n, [=](int64_t i, int64_t k) { write(a + i, read(a + i, k) * factor, k); });
}

// Calls f(row, own) for every row, own being the place of its target in the block or -1.
template <class F>
void over_rows(int64_t rows, int64_t cols, int64_t first, const int64_t* target, F&& f) {
    parallel_for(rows, 1 + kGrain / cols, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
            const int64_t own = target[r] - first;
            f(r, own >= 0 && own < cols ? own : -1);
        }
    });
}

template <class T, class C = compute_t<T>>
void online(T* logits, int64_t rows, int64_t cols, int64_t first, const int64_t* target, C* maximum, C* sum,
            C* others, C* picked, C* acc, int64_t width) {
    over_rows(rows, cols, first, target, [=](int64_t r, int64_t own) {
        T* row = logits + r * cols;
        if (own >= 0) picked[r] = to_compute(row[own]);
        const C most = maximum_of<T>(row, cols);
        if (most > maximum[r]) {
            const C factor = std::exp(maximum[r] - most);
            maximum[r] = most;
            sum[r] *= factor;
            others[r] *= factor;
            if (acc) scale(acc + r * width, factor, width);
        }
        // The target's place is taken out first: subtracted from a sum, its rounding would remain.
        const C at_own = own >= 0 ? std::exp(to_compute(row[own]) - maximum[r]) : C(0);
        if (own >= 0) row[own] = from_compute<T>(C(-HUGE_VAL));
        const C rest = acc ? sum_of_exponentials<true, T>(row, maximum[r], cols)
                           : sum_of_exponentials<false, T>(row, maximum[r], cols);
        sum[r] += rest + at_own;
        others[r] += rest;
    });
}

template <class T, class C = compute_t<T>>
void d_logits(T* logits, int64_t rows, int64_t cols, int64_t first, const int64_t* target, const C* lse,
              const C* d_nll) {
    over_rows(rows, cols, first, target, [=](int64_t r, int64_t own) {
        T* row = logits + r * cols;
        const C m = lse[r], d = d_nll[r];
        // Taken before its place is overwritten; expm1 because a certain row's e^x - 1 cancels.
        const C at_own = own >= 0 ? d * std::expm1(to_compute(row[own]) - m) : C(0);
        for_each_vector<C>(0, cols,
                           [=](int64_t i, int64_t k) { write(row + i, d * exp(read(row + i, k) - m), k); });
        if (own >= 0) row[own] = from_compute<T>(at_own);
    });
}

template <class T, class C = compute_t<T>>
void second(T* logits, T* along, int64_t rows, int64_t cols, int64_t first, const int64_t* target,
            const C* lse, const C* mean, const C* d_nll) {
    over_rows(rows, cols, first, target, [=](int64_t r, int64_t own) {
        T* row = logits + r * cols;
        T* tangent = along + r * cols;
        const C m = lse[r], d = d_nll[r], middle = mean[r];
        const C at_own = own >= 0 ? d * std::expm1(to_compute(row[own]) - m) : C(0);
        for_each_vector<C>(0, cols, [=](int64_t i, int64_t k) {
            const vec<C> p = d * exp(read(row + i, k) - m);
            write(tangent + i, p * (read(tangent + i, k) - middle), k);
            write(row + i, p, k);
        });
        if (own >= 0) row[own] = from_compute<T>(at_own);
    });
}

}  // namespace

void linear_ce_online(Dtype dtype, void* logits, int64_t rows, int64_t cols, int64_t first,
                      const int64_t* target, void* maximum, void* sum, void* others, void* picked, void* acc,
                      int64_t width) {
    dispatch(dtype, [&](auto element) {
        using T = decltype(element);
        using C = compute_t<T>;
        online<T>(static_cast<T*>(logits), rows, cols, first, target, static_cast<C*>(maximum),
                  static_cast<C*>(sum), static_cast<C*>(others), static_cast<C*>(picked),
                  static_cast<C*>(acc), width);
    });
}

void linear_ce_d_logits(Dtype dtype, void* logits, int64_t rows, int64_t cols, int64_t first,
                        const int64_t* target, const void* lse, const void* d_nll) {
    dispatch(dtype, [&](auto element) {
        using T = decltype(element);
        using C = compute_t<T>;
        d_logits<T>(static_cast<T*>(logits), rows, cols, first, target, static_cast<const C*>(lse),
                    static_cast<const C*>(d_nll));
    });
}

void linear_ce_second(Dtype dtype, void* logits, void* along, int64_t rows, int64_t cols, int64_t first,
                      const int64_t* target, const void* lse, const void* mean, const void* d_nll) {
    dispatch(dtype, [&](auto element) {
        using T = decltype(element);
        using C = compute_t<T>;
        second<T>(static_cast<T*>(logits), static_cast<T*>(along), rows, cols, first, target,
                  static_cast<const C*>(lse), static_cast<const C*>(mean), static_cast<const C*>(d_nll));
    });
}

}  // namespace ttt::TTT_ISA
