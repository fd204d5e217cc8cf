// Clipped SGD in two passes over memory: inner products per sequence, then a weighted sum per sequence.
#include <type_traits>

#include "common/lanes.h"
#include "common/parallel.h"
#include "cpu/kernels.h"

namespace ttt::TTT_ISA {
namespace {

// Products are summed in blocks of this many elements whatever the number of threads, blocks in their
// order, so that the sum's bits depend on neither; ttt_kernels/clipped_sgd/cpu.py sizes the scratch by it.
constexpr int64_t kBlock = 8192;

int64_t blocks_of(int64_t n) {
    return (n + kBlock - 1) / kBlock;
}

// A vector of floats as two vectors of doubles: the squares of float32 overflow from 1.8e19 on.
struct Doubles {
    vd low, high;
};
inline Doubles widen(vf v) {
    typedef float half __attribute__((vector_size(kVectorBytes / 2)));
    struct Halves {
        half low, high;
    };
    const Halves h = bit_cast<Halves>(v);
    return {__builtin_convertvector(h.low, vd), __builtin_convertvector(h.high, vd)};
}
inline Doubles widen(vd v) {
    return {v, vd{}};
}

constexpr int kDots = 4;

struct Sum {
    vd low{}, high{};
    void add(const Doubles& a, const Doubles& b) {
        low += a.low * b.low;
        high += a.high * b.high;
    }
    double total() const { return sum_lanes<double>(low + high); }
};

// out[k * apart] = g . g, g . l, g . u and l . u, those that there are.
template <bool has_l, bool has_u, class T>
void dot(const T* g, const T* l, const T* u, int64_t n, double* out, int64_t apart) {
    Sum sums[kDots];
    for_each_vector<compute_t<T>>(0, n, [&](int64_t i, int64_t k) {
        const Doubles of_g = widen(read(g + i, k));
        sums[0].add(of_g, of_g);
        Doubles of_l;
        if constexpr (has_l) {
            of_l = widen(read(l + i, k));
            sums[1].add(of_g, of_l);
        }
        if constexpr (has_u) {
            const Doubles of_u = widen(read(u + i, k));
            sums[2].add(of_g, of_u);
            if constexpr (has_l) sums[3].add(of_l, of_u);
        }
    });
    for (int k = 0; k < kDots; ++k) out[k * apart] = sums[k].total();
}

template <bool has_l, bool has_u, class T>
void dots(const T* g, int64_t g_stride, const T* l, int64_t l_stride, const T* u, int64_t u_stride,
          double* scratch, double* sums, int64_t rows, int64_t n) {
    const int64_t blocks = blocks_of(n);
    parallel_for(rows * blocks, 2, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
            const int64_t row = task / blocks, start = task % blocks * kBlock;
            dot<has_l, has_u, T>(g + row * g_stride + start, has_l ? l + row * l_stride + start : nullptr,
                                 has_u ? u + row * u_stride + start : nullptr,
                                 n - start < kBlock ? n - start : kBlock, scratch + task, rows * blocks);
        }
    });
    for (int64_t row = 0; row < kDots * rows; ++row)
        for (int64_t block = 0; block < blocks; ++block) sums[row] += scratch[row * blocks + block];
}

template <bool has_c, class T, class U, class C = compute_t<T>>
void combine(const T* a, C a_factor, const T* b, C b_factor, const T* c, C c_factor, T* out, U* copy,
             int64_t n) {
    const auto value = [=](int64_t at, int64_t k) {
        const vec<C> sum = a_factor * read(a + at, k) + b_factor * read(b + at, k);
        if constexpr (has_c)
            return sum + c_factor * read(c + at, k);
        else
            return sum;
    };
    if constexpr (std::is_same_v<C, compute_t<U>>) {
        for_each_vector<C>(0, n, [=](int64_t at, int64_t k) {
            write(out + at, value(at, k), k);
            // A copy is rounded from the stored weight, as a cast of it would be.
            if (copy) write(copy + at, read(out + at, k), k);
        });
    } else {
        for_each_vector<C>(0, n, [=](int64_t at, int64_t k) { write(out + at, value(at, k), k); });
        for (int64_t i = 0; copy && i < n; ++i)
            copy[i] = from_compute<U>(static_cast<compute_t<U>>(to_compute(out[i])));
    }
}

}  // namespace

void clipped_sgd_dots(Dtype dtype, const void* g, int64_t g_stride, const void* l, int64_t l_stride,
                      const void* u, int64_t u_stride, double* scratch, double* sums, int64_t rows,
                      int64_t n) {
    dispatch(dtype, [&](auto element) {
        using T = decltype(element);
        const auto run = l && u ? dots<true, true, T>
                         : l    ? dots<true, false, T>
                         : u    ? dots<false, true, T>
                                : dots<false, false, T>;
        run(static_cast<const T*>(g), g_stride, static_cast<const T*>(l), l_stride, static_cast<const T*>(u),
            u_stride, scratch, sums, rows, n);
    });
}

void clipped_sgd_combine(Dtype dtype, const void* a, int64_t a_stride, const double* a_factor, const void* b,
                         int64_t b_stride, const double* b_factor, const void* c, int64_t c_stride,
                         const double* c_factor, const bool* active, void* out, int64_t out_stride,
                         Dtype copy_dtype, void* copy, int64_t copy_stride, int64_t rows, int64_t n) {
    const int64_t blocks = blocks_of(n);
    dispatch(dtype, [&](auto element) {
        using T = decltype(element);
        using C = compute_t<T>;
        dispatch(copy_dtype, [&](auto copied) {
            using U = decltype(copied);
            const auto run = c ? combine<true, T, U> : combine<false, T, U>;
            parallel_for(rows * blocks, 2, [&](int64_t begin, int64_t end) {
                for (int64_t task = begin; task < end; ++task) {
                    const int64_t row = task / blocks, start = task % blocks * kBlock;
                    if (active && !active[row]) continue;
                    run(static_cast<const T*>(a) + row * a_stride + start, static_cast<C>(a_factor[row]),
                        static_cast<const T*>(b) + row * b_stride + start, static_cast<C>(b_factor[row]),
                        c ? static_cast<const T*>(c) + row * c_stride + start : nullptr,
                        c ? static_cast<C>(c_factor[row]) : C(0),
                        static_cast<T*>(out) + row * out_stride + start,
                        copy ? static_cast<U*>(copy) + row * copy_stride + start : nullptr,
                        n - start < kBlock ? n - start : kBlock);
                }
            });
        });
    });
}

}  // namespace ttt::TTT_ISA
