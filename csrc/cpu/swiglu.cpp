// What stands between the products of swiglu, one pass over memory each. With s = 1 / (1 + e^-g): silu(g) = g
// s, silu'(g) = s (1 + g (1 - s)) and silu''(g) = s (1 - s) (2 + g (1 - 2 s)).
#include "common/lanes.h"
#include "common/parallel.h"
#include "cpu/kernels.h"

namespace ttt::TTT_ISA {
namespace {

constexpr int64_t kGrain = 8192;

template <class C>
vec<C> sigmoid(vec<C> g) {
    return splat(C(1)) / (splat(C(1)) + exp(-g));
}

template <class C, class F>
void over_elements(int64_t count, F&& f) {
    constexpr int L = lanes<C>;
    parallel_for((count + L - 1) / L, kGrain / L, [&](int64_t begin, int64_t end) {
        for_each_vector<C>(begin * L, end * L < count ? end * L : count, f);
    });
}

template <class T>
void write_wanted(T* p, int64_t i, vec<compute_t<T>> v, int64_t n) {
    if (p) write(p + i, v, n);
}

template <class T, class P>
struct Swiglu {
    using C = compute_t<T>;

    static void forward(const P* gate, const P* up, P* hidden, T* kept_gate, T* kept_up, int64_t count) {
        over_elements<C>(count, [=](int64_t i, int64_t n) {
            const vec<C> g = read(gate + i, n), u = read(up + i, n);
            write(hidden + i, g * sigmoid<C>(g) * u, n);
            write_wanted(kept_gate, i, g, n);
            write_wanted(kept_up, i, u, n);
        });
    }

    static void backward(const T* gate, const T* up, const P* d_hidden, const T* gate_bar, const T* up_bar,
                         P* d_gate, P* d_up, P* hidden, int64_t count) {
        over_elements<C>(count, [=](int64_t i, int64_t n) {
            const vec<C> g = read(gate + i, n), u = read(up + i, n), dh = read_or_zero(d_hidden, i, n);
            const vec<C> s = sigmoid<C>(g), silu = g * s;
            const vec<C> to_g = read_or_zero(gate_bar, i, n), to_u = read_or_zero(up_bar, i, n);
            write_wanted(d_gate, i, dh * u * (s + silu * (splat(C(1)) - s)) + to_g, n);
            write_wanted(d_up, i, dh * silu + to_u, n);
            write_wanted(hidden, i, silu * u, n);
        });
    }

    static void double_backward(const T* gate, const T* up, const P* d_hidden, const P* h_bar,
                                const P* t_gate, const P* t_up, P* t_hidden, P* gate_bar, P* up_bar,
                                P* d_gate, P* d_up, P* hidden, int64_t count) {
        over_elements<C>(count, [=](int64_t i, int64_t n) {
            const vec<C> g = read(gate + i, n), u = read(up + i, n), dh = read_or_zero(d_hidden, i, n);
            const vec<C> to_h = read_or_zero(h_bar, i, n);
            const vec<C> tg = read_or_zero(t_gate, i, n), tu = read_or_zero(t_up, i, n);
            const vec<C> one = splat(C(1)), s = sigmoid<C>(g), rest = one - s, silu = g * s;
            const vec<C> slope = s + silu * rest, curve = s * rest * (splat(C(2)) + g * (rest - s));
            write_wanted(t_hidden, i, slope * u * tg + silu * tu, n);
            write_wanted(gate_bar, i, dh * (curve * u * tg + slope * tu) + to_h * slope * u, n);
            write_wanted(up_bar, i, dh * slope * tg + to_h * silu, n);
            write_wanted(d_gate, i, dh * u * slope, n);
            write_wanted(d_up, i, dh * silu, n);
            write_wanted(hidden, i, silu * u, n);
        });
    }
};

// Calls f with the kernels of an element type, for products in that type or in the one that it is computed
// in.
template <class F>
void choose(Dtype dtype, Dtype product, F&& f) {
    dispatch(dtype, [&](auto element) {
        using T = decltype(element);
        if (dtype == product)
            f(Swiglu<T, T>{}, T{}, T{});
        else
            f(Swiglu<T, compute_t<T>>{}, T{}, compute_t<T>{});
    });
}

}  // namespace

void swiglu_forward(Dtype dtype, Dtype product, const void* gate, const void* up, void* hidden,
                    void* kept_gate, void* kept_up, int64_t count) {
    choose(dtype, product, [&](auto kernels, auto element, auto in_product) {
        using T = decltype(element);
        using P = decltype(in_product);
        kernels.forward(static_cast<const P*>(gate), static_cast<const P*>(up), static_cast<P*>(hidden),
                        static_cast<T*>(kept_gate), static_cast<T*>(kept_up), count);
    });
}

void swiglu_backward(Dtype dtype, Dtype product, const void* gate, const void* up, const void* d_hidden,
                     const void* gate_bar, const void* up_bar, void* d_gate, void* d_up, void* hidden,
                     int64_t count) {
    choose(dtype, product, [&](auto kernels, auto element, auto in_product) {
        using T = decltype(element);
        using P = decltype(in_product);
        kernels.backward(static_cast<const T*>(gate), static_cast<const T*>(up),
                         static_cast<const P*>(d_hidden), static_cast<const T*>(gate_bar),
                         static_cast<const T*>(up_bar), static_cast<P*>(d_gate), static_cast<P*>(d_up),
                         static_cast<P*>(hidden), count);
    });
}

void swiglu_double_backward(Dtype dtype, Dtype product, const void* gate, const void* up,
                            const void* d_hidden, const void* h_bar, const void* t_gate, const void* t_up,
                            void* t_hidden, void* gate_bar, void* up_bar, void* d_gate, void* d_up,
                            void* hidden, int64_t count) {
    choose(dtype, product, [&](auto kernels, auto element, auto in_product) {
        using T = decltype(element);
        using P = decltype(in_product);
        kernels.double_backward(
            static_cast<const T*>(gate), static_cast<const T*>(up), static_cast<const P*>(d_hidden),
            static_cast<const P*>(h_bar), static_cast<const P*>(t_gate), static_cast<const P*>(t_up),
            static_cast<P*>(t_hidden), static_cast<P*>(gate_bar), static_cast<P*>(up_bar),
            static_cast<P*>(d_gate), static_cast<P*>(d_up), static_cast<P*>(hidden), count);
    });
}

}  // namespace ttt::TTT_ISA
