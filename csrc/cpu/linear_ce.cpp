// Cross-entropy over a vocabulary that is read block by block: the passes over the logits of one block.
#include <cmath>

#include "common/parallel.h"
#include "common/vec.h"
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

template <class T, class C = compute_t<T>>
void online(T* logits, int64_t rows, int64_t cols, int64_t first, const int64_t* target, C* maximum, C* sum,
            C* picked, C* acc, int64_t width) {
    constexpr int L = lanes<C>;
    parallel_for(rows, 1 + kGrain / cols, [=](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
            T* row = logits + r * cols;
            const int64_t own = target[r] - first;
            if (own >= 0 && own < cols) picked[r] = to_compute(row[own]);
            const C most = maximum_of<T>(row, cols);
            if (most > maximum[r]) {
                const C factor = std::exp(maximum[r] - most);
                maximum[r] = most;
                sum[r] *= factor;
                if (acc) {
                    C* a = acc + r * width;
                    int64_t i = 0;
                    for (; i + L <= width; i += L) store(a + i, load(a + i) * factor);
                    for (; i < width; ++i) a[i] *= factor;
                }
            }
            sum[r] += acc ? sum_of_exponentials<true, T>(row, maximum[r], cols)
                          : sum_of_exponentials<false, T>(row, maximum[r], cols);
        }
    });
}

template <class T, class C = compute_t<T>>
void d_logits(T* logits, int64_t rows, int64_t cols, int64_t first, const int64_t* target, const C* lse,
              const C* d_nll) {
    constexpr int L = lanes<C>;
    parallel_for(rows, 1 + kGrain / cols, [=](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
            T* row = logits + r * cols;
            const C m = lse[r], d = d_nll[r];
            const int64_t own = target[r] - first;
            const bool has_own = own >= 0 && own < cols;
            // Taken before its place is overwritten; expm1 because a certain row's e^x - 1 cancels.
            const C at_own = has_own ? d * std::expm1(to_compute(row[own]) - m) : C(0);
            int64_t i = 0;
            for (; i + L <= cols; i += L) store(row + i, d * exp(load(row + i) - m));
            if (i < cols) store_first(row + i, d * exp(load_first(row + i, cols - i) - m), cols - i);
            if (has_own) row[own] = from_compute<T>(at_own);
        }
    });
}

}  // namespace

void linear_ce_online(Dtype dtype, void* logits, int64_t rows, int64_t cols, int64_t first,
                      const int64_t* target, void* maximum, void* sum, void* picked, void* acc,
                      int64_t width) {
    dispatch(dtype, [&](auto element) {
        using T = decltype(element);
        using C = compute_t<T>;
        online<T>(static_cast<T*>(logits), rows, cols, first, target, static_cast<C*>(maximum),
                  static_cast<C*>(sum), static_cast<C*>(picked), static_cast<C*>(acc), width);
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

}  // namespace ttt::TTT_ISA
