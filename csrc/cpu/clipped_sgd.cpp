// Clipped SGD in two passes over memory: inner products per sequence, then a weighted sum per sequence.
#include <type_traits>

#include "common/parallel.h"
#include "common/vec.h"
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

template <class T>
double dot(const T* a, const T* b, int64_t n) {
    constexpr int L = lanes<compute_t<T>>;
    vd low{}, high{};
    int64_t i = 0;
    for (; i + L <= n; i += L) {
        const Doubles x = widen(load(a + i)), y = widen(load(b + i));
        low += x.low * y.low;
        high += x.high * y.high;
    }
    double total = sum_lanes<double>(low + high);
    for (; i < n; ++i) total += static_cast<double>(to_compute(a[i])) * static_cast<double>(to_compute(b[i]));
    return total;
}

template <class T>
void dots(const T* a, int64_t a_stride, const T* b, int64_t b_stride, double* scratch, double* sums,
          int64_t rows, int64_t n) {
    const int64_t blocks = blocks_of(n);
    parallel_for(rows * blocks, 2, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
            const int64_t row = task / blocks, start = task % blocks * kBlock;
            const int64_t count = n - start < kBlock ? n - start : kBlock;
            const T* x = a + row * a_stride + start;
            scratch[task] = dot<T>(x, x, count);
            if (b) scratch[rows * blocks + task] = dot<T>(x, b + row * b_stride + start, count);
        }
    });
    for (int64_t row = 0; row < (b ? 2 * rows : rows); ++row)
        for (int64_t block = 0; block < blocks; ++block) sums[row] += scratch[row * blocks + block];
}

template <class T, class U, class C = compute_t<T>>
void combine(const T* a, C a_factor, const T* b, C b_factor, T* out, U* copy, int64_t n) {
    constexpr int L = lanes<C>;
    int64_t i = 0;
    if constexpr (std::is_same_v<C, compute_t<U>>) {
        for (; i + L <= n; i += L) {
            store(out + i, a_factor * load(a + i) + b_factor * load(b + i));
            // A copy is rounded from the stored weight, as a cast of it would be.
            if (copy) store(copy + i, load(out + i));
        }
    }
    for (; i < n; ++i) {
        out[i] = from_compute<T>(a_factor * to_compute(a[i]) + b_factor * to_compute(b[i]));
        if (copy) copy[i] = from_compute<U>(static_cast<compute_t<U>>(to_compute(out[i])));
    }
}

}  // namespace

void clipped_sgd_dots(Dtype dtype, const void* a, int64_t a_stride, const void* b, int64_t b_stride,
                      double* scratch, double* sums, int64_t rows, int64_t n) {
    dispatch(dtype, [&](auto element) {
        using T = decltype(element);
        dots<T>(static_cast<const T*>(a), a_stride, static_cast<const T*>(b), b_stride, scratch, sums, rows,
                n);
    });
}

void clipped_sgd_combine(Dtype dtype, const void* a, int64_t a_stride, const double* a_factor, const void* b,
                         int64_t b_stride, const double* b_factor, const bool* active, void* out,
                         int64_t out_stride, Dtype copy_dtype, void* copy, int64_t copy_stride, int64_t rows,
                         int64_t n) {
    const int64_t blocks = blocks_of(n);
    dispatch(dtype, [&](auto element) {
        using T = decltype(element);
        using C = compute_t<T>;
        dispatch(copy_dtype, [&](auto copied) {
            using U = decltype(copied);
            parallel_for(rows * blocks, 2, [&](int64_t begin, int64_t end) {
                for (int64_t task = begin; task < end; ++task) {
                    const int64_t row = task / blocks, start = task % blocks * kBlock;
                    if (active && !active[row]) continue;
                    combine<T, U>(
                        static_cast<const T*>(a) + row * a_stride + start, static_cast<C>(a_factor[row]),
                        static_cast<const T*>(b) + row * b_stride + start, static_cast<C>(b_factor[row]),
                        static_cast<T*>(out) + row * out_stride + start,
                        copy ? static_cast<U*>(copy) + row * copy_stride + start : nullptr,
                        n - start < kBlock ? n - start : kBlock);
                }
            });
        });
    });
}

}  // namespace ttt::TTT_ISA
