// Sums over a contiguous row, in the type computed in.
#pragma once

#include "common/vec.h"

namespace ttt::TTT_ISA {

template <class T, class C = compute_t<T>>
inline C sum_of_squares(const T* x, int64_t n) {
    constexpr int L = lanes<C>;
    vec<C> s{};
    int64_t i = 0;
    for (; i + L <= n; i += L) s += load(x + i) * load(x + i);
    C total = sum_lanes<C>(s);
    for (; i < n; ++i) total += to_compute(x[i]) * to_compute(x[i]);
    return total;
}

}  // namespace ttt::TTT_ISA
