// silu(gate) * up and its gradient, one pass over memory each; silu(g) = g s with s = 1 / (1 + e^-g).
#include "common/parallel.h"
#include "common/vec.h"
#include "cpu/kernels.h"

namespace ttt::TTT_ISA {
namespace {

constexpr int64_t kGrain = 8192;

template <class C>
vec<C> sigmoid(vec<C> g) {
    return splat(C(1)) / (splat(C(1)) + exp(-g));
}

// Calls f(i, n) for every vector of n lanes at element i, the last of them short.
template <class C, class F>
void for_each_vector(int64_t count, F&& f) {
    constexpr int L = lanes<C>;
    parallel_for((count + L - 1) / L, kGrain / L, [&](int64_t begin, int64_t end) {
        const int64_t whole = end * L <= count ? end : count / L;
        for (int64_t v = begin; v < whole; ++v) f(v * L, L);
        if (whole < end) f(whole * L, count - whole * L);
    });
}

template <class T>
vec<compute_t<T>> read(const T* p, int64_t n) {
    return n == lanes<compute_t<T>> ? load(p) : load_first(p, n);
}

template <class T>
void write(T* p, vec<compute_t<T>> v, int64_t n) {
    if (n == lanes<compute_t<T>>)
        store(p, v);
    else
        store_first(p, v, n);
}

template <class T, class C = compute_t<T>>
void forward(const T* gate, const T* up, T* hidden, int64_t count) {
    for_each_vector<C>(count, [=](int64_t i, int64_t n) {
        const vec<C> g = read(gate + i, n);
        write(hidden + i, g * sigmoid<C>(g) * read(up + i, n), n);
    });
}

// d_gate = d_hidden up s (1 + g (1 - s)), d_up = d_hidden g s.
template <class T, class C = compute_t<T>>
void backward(const T* d_hidden, const T* gate, const T* up, T* d_gate, T* d_up, T* hidden, int64_t count) {
    for_each_vector<C>(count, [=](int64_t i, int64_t n) {
        const vec<C> dh = read(d_hidden + i, n), g = read(gate + i, n), u = read(up + i, n);
        const vec<C> s = sigmoid<C>(g), silu = g * s;
        write(d_gate + i, dh * u * (s + silu * (splat(C(1)) - s)), n);
        write(d_up + i, dh * silu, n);
        if (hidden) write(hidden + i, silu * u, n);
    });
}

}  // namespace

void swiglu_forward(Dtype dtype, const void* gate, const void* up, void* hidden, int64_t count) {
    dispatch(dtype, [&](auto element) {
        using T = decltype(element);
        forward<T>(static_cast<const T*>(gate), static_cast<const T*>(up), static_cast<T*>(hidden), count);
    });
}

void swiglu_backward(Dtype dtype, const void* d_hidden, const void* gate, const void* up, void* d_gate,
                     void* d_up, void* hidden, int64_t count) {
    dispatch(dtype, [&](auto element) {
        using T = decltype(element);
        backward<T>(static_cast<const T*>(d_hidden), static_cast<const T*>(gate), static_cast<const T*>(up),
                    static_cast<T*>(d_gate), static_cast<T*>(d_up), static_cast<T*>(hidden), count);
    });
}

}  // namespace ttt::TTT_ISA
