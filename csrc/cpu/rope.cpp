// Rotary positions: every pair (a, b) becomes (a cos - b sin, b cos + a sin); alone, or fused behind the
// RMSNorm of a head so that a query or key is read once and written once, into a cache if wanted.
#include <cmath>
#include <utility>

#include "common/lanes.h"
#include "common/parallel.h"
#include "common/reduce.h"
#include "cpu/kernels.h"

namespace ttt::TTT_ISA {
namespace {

template <class C, int... I>
inline vec<C> swap_neighbours(vec<C> v, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(v, v, (I ^ 1)...);
}

// p[0], p[0], p[1], p[1], ...
template <class C, int... I>
inline vec<C> load_twice(const C* p, std::integer_sequence<int, I...>) {
    // A vector of its own: half of a whole one would be read from where the other half was not written yet.
    typedef C half __attribute__((vector_size(kVectorBytes / 2)));
    half v;
    std::memcpy(&v, p, sizeof v);
    return __builtin_shufflevector(v, v, (I / 2)...);
}

template <class C>
inline vec<C> minus_plus(C x) {
    vec<C> v;
    for (int i = 0; i < lanes<C>; ++i) v[i] = i % 2 ? x : -x;
    return v;
}

// The element that is turned: x, or the normalized x * r * weight.
template <bool Normed, class T, class C>
struct Row {
    const T* x;
    C r;
    const C* weight;

    vec<C> lanes_at(int64_t i) const {
        if constexpr (Normed)
            return load(x + i) * r * load(weight + i);
        else
            return load(x + i);
    }
    C at(int64_t i) const {
        if constexpr (Normed)
            return to_compute(x[i]) * r * weight[i];
        else
            return to_compute(x[i]);
    }
};

template <bool Normed, class T, class C>
inline void rotate_pair(const Row<Normed, T, C>& row, C cos, C sin, T* y, int64_t i, int64_t j) {
    const C a = row.at(i), b = row.at(j);
    y[i] = from_compute<T>(a * cos - b * sin);
    y[j] = from_compute<T>(b * cos + a * sin);
}

// Pairs (0, 1), (2, 3), ...; sign is 1, or -1 to turn back.
template <bool Normed, class T, class C>
void rotate_interleaved(const Row<Normed, T, C>& row, const C* cos, const C* sin, C sign, T* y, int64_t n,
                        bool stream) {
    constexpr int L = lanes<C>;
    using all = std::make_integer_sequence<int, L>;
    const vec<C> signs = minus_plus<C>(sign);
    int64_t i = 0;
    for (; i + L <= n; i += L) {
        const vec<C> v = row.lanes_at(i);
        const vec<C> c = load_twice<C>(cos + i / 2, all{});
        const vec<C> s = load_twice<C>(sin + i / 2, all{}) * signs;
        write(y + i, v * c + swap_neighbours<C>(v, all{}) * s, L, stream);
    }
    for (; i < n; i += 2) rotate_pair<Normed, T, C>(row, cos[i / 2], sign * sin[i / 2], y, i, i + 1);
}

// Pairs (0, n/2), (1, n/2 + 1), ...
template <bool Normed, class T, class C>
void rotate_halves(const Row<Normed, T, C>& row, const C* cos, const C* sin, C sign, T* y, int64_t n,
                   bool stream) {
    constexpr int L = lanes<C>;
    const int64_t half = n / 2;
    int64_t i = 0;
    for (; i + L <= half; i += L) {
        const vec<C> a = row.lanes_at(i), b = row.lanes_at(i + half);
        const vec<C> c = load(cos + i), s = load(sin + i) * sign;
        write(y + i, a * c - b * s, L, stream);
        write(y + i + half, b * c + a * s, L, stream && streamable(y + half));
    }
    for (; i < half; ++i) rotate_pair<Normed, T, C>(row, cos[i], sign * sin[i], y, i, i + half);
}

template <bool Normed, class T, class C = compute_t<T>>
void rotate(const T* x, int64_t x_b, int64_t x_t, int64_t x_h, const C* weight, const C* cos, const C* sin,
            int64_t table_b, T* y, int64_t y_b, int64_t y_t, int64_t y_h, C* rstd, int64_t B, int64_t Tn,
            int64_t H, int64_t D, bool interleaved, C sign, bool past_caches, C eps) {
    parallel_for(B * Tn, 1 + 16384 / (H * D), [&](int64_t begin, int64_t end) {
        for (int64_t token = begin; token < end; ++token) {
            const int64_t b = token / Tn, t = token % Tn;
            const C* c = cos + b * table_b + t * (D / 2);
            const C* s = sin + b * table_b + t * (D / 2);
            for (int64_t h = 0; h < H; ++h) {
                Row<Normed, T, C> row{x + b * x_b + t * x_t + h * x_h, C(1), weight};
                T* yr = y + b * y_b + t * y_t + h * y_h;
                const bool stream = past_caches && streamable(yr);
                if constexpr (Normed) {
                    row.r = C(1) / std::sqrt(sum_of_squares<T>(row.x, D) / C(D) + eps);
                    if (rstd) rstd[token * H + h] = row.r;
                }
                if (interleaved)
                    rotate_interleaved<Normed, T, C>(row, c, s, sign, yr, D, stream);
                else
                    rotate_halves<Normed, T, C>(row, c, s, sign, yr, D, stream);
            }
        }
        if (past_caches) end_stream();
    });
}

}  // namespace

void rope_rotate(Dtype dtype, const void* x, int64_t x_b, int64_t x_t, int64_t x_h, const void* cos,
                 const void* sin, int64_t table_b, void* y, int64_t y_b, int64_t y_t, int64_t y_h, int64_t B,
                 int64_t T, int64_t H, int64_t D, bool interleaved, bool inverse, bool past_caches) {
    dispatch(dtype, [&](auto element) {
        using E = decltype(element);
        using C = compute_t<E>;
        rotate<false, E, C>(static_cast<const E*>(x), x_b, x_t, x_h, nullptr, static_cast<const C*>(cos),
                            static_cast<const C*>(sin), table_b, static_cast<E*>(y), y_b, y_t, y_h, nullptr,
                            B, T, H, D, interleaved, C(inverse ? -1 : 1), past_caches, C(0));
    });
}

void rope_norm_rotate(Dtype dtype, const void* x, int64_t x_b, int64_t x_t, int64_t x_h, const void* weight,
                      const void* cos, const void* sin, int64_t table_b, void* y, int64_t y_b, int64_t y_t,
                      int64_t y_h, void* rstd, int64_t B, int64_t T, int64_t H, int64_t D, bool interleaved,
                      double eps) {
    dispatch(dtype, [&](auto element) {
        using E = decltype(element);
        using C = compute_t<E>;
        rotate<true, E, C>(static_cast<const E*>(x), x_b, x_t, x_h, static_cast<const C*>(weight),
                           static_cast<const C*>(cos), static_cast<const C*>(sin), table_b,
                           static_cast<E*>(y), y_b, y_t, y_h, static_cast<C*>(rstd), B, T, H, D, interleaved,
                           C(1), false, static_cast<C>(eps));
    });
}

}  // namespace ttt::TTT_ISA
