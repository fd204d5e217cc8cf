// RMSNorm: y = x * rstd * weight, rstd = (mean(x^2) + eps)^-1/2, one pass over memory per direction.
#include <cmath>

#include "common/parallel.h"
#include "common/reduce.h"
#include "common/vec.h"
#include "cpu/kernels.h"

namespace ttt::TTT_ISA {
namespace {

constexpr int64_t kRowsPerSum = 128;

template <class T, class C = compute_t<T>>
C weighted_dot(const T* a, const T* b, const C* weight, int64_t n) {
    constexpr int L = lanes<C>;
    vec<C> s{};
    int64_t i = 0;
    for (; i + L <= n; i += L) s += load(a + i) * load(b + i) * load(weight + i);
    C total = sum_lanes<C>(s);
    for (; i < n; ++i) total += to_compute(a[i]) * to_compute(b[i]) * weight[i];
    return total;
}

template <class T, class C = compute_t<T>>
void forward(const T* x, int64_t x_stride, const C* weight, T* y, C* rstd, int64_t rows, int64_t n, C eps) {
    constexpr int L = lanes<C>;
    parallel_for(rows, 1 + 16384 / n, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            const T* xr = x + row * x_stride;
            T* yr = y + row * n;
            const C r = C(1) / std::sqrt(sum_of_squares<T>(xr, n) / C(n) + eps);
            rstd[row] = r;
            int64_t i = 0;
            for (; i + L <= n; i += L) store(yr + i, load(xr + i) * r * load(weight + i));
            for (; i < n; ++i) yr[i] = from_compute<T>(to_compute(xr[i]) * r * weight[i]);
        }
    });
}

// dx = rstd * (w dy - xhat * mean(w dy * xhat)), dw = sum over rows of dy * xhat, with xhat = x * rstd.
template <class T, class C = compute_t<T>>
void backward(const T* dy, int64_t dy_stride, const T* x, int64_t x_stride, const C* weight, const C* rstd,
              T* dx, C* dw, int64_t rows, int64_t n) {
    constexpr int L = lanes<C>;
    if (dx) {
        parallel_for(rows, 1 + 16384 / n, [&](int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; ++row) {
                const T* xr = x + row * x_stride;
                const T* dyr = dy + row * dy_stride;
                T* dxr = dx + row * n;
                const C r = rstd[row];
                const C k = r * r * weighted_dot<T>(dyr, xr, weight, n) / C(n);
                int64_t i = 0;
                for (; i + L <= n; i += L)
                    store(dxr + i, r * (load(weight + i) * load(dyr + i) - k * load(xr + i)));
                for (; i < n; ++i)
                    dxr[i] = from_compute<T>(r * (weight[i] * to_compute(dyr[i]) - k * to_compute(xr[i])));
            }
        });
    }
    if (dw) {
        // Columns are shared out, so that the order of every sum is the same for any number of threads.
        parallel_for((n + L - 1) / L, 1 + 4096 / rows, [&](int64_t begin, int64_t end) {
            const int64_t first = begin * L, last = end * L < n ? end * L : n;
            for (int64_t i = first; i < last; ++i) dw[i] = C(0);
            // Sums of sums: the error of one long sum would grow with the number of rows.
            for (int64_t top = 0; top < rows; top += kRowsPerSum) {
                const int64_t bottom = top + kRowsPerSum < rows ? top + kRowsPerSum : rows;
                int64_t i = first;
                for (; i + L <= last; i += L) {
                    vec<C> s{};
                    for (int64_t row = top; row < bottom; ++row)
                        s += rstd[row] * load(dy + row * dy_stride + i) * load(x + row * x_stride + i);
                    store(dw + i, load(dw + i) + s);
                }
                for (; i < last; ++i) {
                    C s(0);
                    for (int64_t row = top; row < bottom; ++row)
                        s += rstd[row] * to_compute(dy[row * dy_stride + i]) *
                             to_compute(x[row * x_stride + i]);
                    dw[i] += s;
                }
            }
        });
    }
}

}  // namespace

void rms_norm_forward(Dtype dtype, const void* x, int64_t x_stride, const void* weight, void* y, void* rstd,
                      int64_t rows, int64_t n, double eps) {
    dispatch(dtype, [&](auto element) {
        using T = decltype(element);
        using C = compute_t<T>;
        forward<T>(static_cast<const T*>(x), x_stride, static_cast<const C*>(weight), static_cast<T*>(y),
                   static_cast<C*>(rstd), rows, n, static_cast<C>(eps));
    });
}

void rms_norm_backward(Dtype dtype, const void* dy, int64_t dy_stride, const void* x, int64_t x_stride,
                       const void* weight, const void* rstd, void* dx, void* dw, int64_t rows, int64_t n) {
    dispatch(dtype, [&](auto element) {
        using T = decltype(element);
        using C = compute_t<T>;
        backward<T>(static_cast<const T*>(dy), dy_stride, static_cast<const T*>(x), x_stride,
                    static_cast<const C*>(weight), static_cast<const C*>(rstd), static_cast<T*>(dx),
                    static_cast<C*>(dw), rows, n);
    });
}

}  // namespace ttt::TTT_ISA
