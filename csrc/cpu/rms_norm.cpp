// RMSNorm: y = x * rstd * weight + residual, rstd = (mean(x^2) + eps)^-1/2, one pass over memory per order.
#include <cmath>

#include "common/lanes.h"
#include "common/parallel.h"
#include "common/reduce.h"
#include "cpu/kernels.h"

namespace ttt::TTT_ISA {
namespace {

// Sums of sums: the error of one long sum would grow with the number of rows.
constexpr int64_t kRowsPerSum = 32;

template <class T, class C = compute_t<T>>
void forward(const T* x, int64_t x_stride, const C* weight, const T* residual, int64_t residual_stride, T* y,
             C* rstd, bool past_caches, int64_t rows, int64_t n, C eps) {
    parallel_for(rows, 1 + 16384 / n, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            const T* xr = x + row * x_stride;
            const T* zr = residual ? residual + row * residual_stride : nullptr;
            T* yr = y + row * n;
            const C r = C(1) / std::sqrt(sum_of_squares<T>(xr, n) / C(n) + eps);
            rstd[row] = r;
            const bool stream = past_caches && streamable(yr);
            for_each_vector<C>(0, n, [=](int64_t i, int64_t k) {
                write(yr + i, read(xr + i, k) * r * read(weight + i, k) + read_or_zero(zr, i, k), k, stream);
            });
        }
        if (past_caches) end_stream();
    });
}

// Calls f(row, sum) for every row, where f adds what the row gives to sum (n), and puts the sum of all into
// `total`; without a total, sum is null.
template <class C, class F>
void over_rows(int64_t rows, int64_t n, C* total, C* partial, bool past_caches, F&& f) {
    const int64_t chunks = (rows + kRowsPerSum - 1) / kRowsPerSum;
    parallel_for(chunks, 1 + 16384 / (n * kRowsPerSum), [&](int64_t begin, int64_t end) {
        for (int64_t chunk = begin; chunk < end; ++chunk) {
            C* sum = total ? partial + chunk * n : nullptr;
            if (sum)
                for (int64_t i = 0; i < n; ++i) sum[i] = C(0);
            const int64_t last = (chunk + 1) * kRowsPerSum;
            for (int64_t row = chunk * kRowsPerSum; row < (last < rows ? last : rows); ++row) f(row, sum);
        }
        if (past_caches) end_stream();
    });
    if (!total) return;
    constexpr int L = lanes<C>;
    parallel_for((n + L - 1) / L, 1 + 4096 / chunks, [&](int64_t begin, int64_t end) {
        for_each_vector<C>(begin * L, end * L < n ? end * L : n, [=](int64_t i, int64_t k) {
            vec<C> sum{};
            for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += read(partial + chunk * n + i, k);
            write(total + i, sum, k);
        });
    });
}

// dx = rstd * (w dy - xhat * mean(w dy * xhat)), dw = sum over rows of dy * xhat, with xhat = x * rstd.
template <class T, class C = compute_t<T>>
void backward(const T* dy, int64_t dy_stride, const T* x, int64_t x_stride, const C* weight, const C* rstd,
              T* dx, C* dw, T* d_residual, C* partial, bool past_caches, int64_t rows, int64_t n) {
    over_rows<C>(rows, n, dw, partial, past_caches, [=](int64_t row, C* sum) {
        const T* xr = x + row * x_stride;
        const T* dyr = dy + row * dy_stride;
        const C r = rstd[row];
        if (dx) {
            vec<C> product{};
            for_each_vector<C>(0, n, [&](int64_t i, int64_t k) {
                product += read(weight + i, k) * read(dyr + i, k) * read(xr + i, k);
            });
            const C mean = r * r * sum_lanes<C>(product) / C(n);
            T* dxr = dx + row * n;
            const bool stream = past_caches && streamable(dxr);
            for_each_vector<C>(0, n, [=](int64_t i, int64_t k) {
                write(dxr + i, r * (read(weight + i, k) * read(dyr + i, k) - mean * read(xr + i, k)), k,
                      stream);
            });
        }
        if (sum)
            for_each_vector<C>(0, n, [=](int64_t i, int64_t k) {
                write(sum + i, read(sum + i, k) + r * read(dyr + i, k) * read(xr + i, k), k);
            });
        if (d_residual) {
            T* to = d_residual + row * n;
            const bool stream = past_caches && streamable(to);
            for_each_vector<C>(0, n,
                               [=](int64_t i, int64_t k) { write(to + i, read(dyr + i, k), k, stream); });
        }
    });
}

// With m = mean(w dy xhat), p = mean(a xhat), e = r (a - xhat p), the cotangent of w dy, and q = mean(a w
// dy): dy_bar = e w + b xhat + z, w_bar = sum over rows of e dy, and x_bar = r (b dy - r (m a + p w dy)) - r
// xhat (mean(b dy xhat) + r (q - 3 m p)).
template <class T, class C = compute_t<T>>
void double_backward(const T* a, int64_t a_stride, const C* b, const T* z, int64_t z_stride, const T* dy,
                     int64_t dy_stride, const T* x, int64_t x_stride, const C* weight, const C* rstd,
                     T* dy_bar, T* x_bar, C* w_bar, C* partial, bool past_caches, int64_t rows, int64_t n) {
    over_rows<C>(rows, n, w_bar, partial, past_caches, [=](int64_t row, C* sum) {
        const T* xr = x + row * x_stride;
        const T* dyr = dy + row * dy_stride;
        const T* ar = a ? a + row * a_stride : nullptr;
        const T* zr = z ? z + row * z_stride : nullptr;
        T* to_dy = dy_bar ? dy_bar + row * n : nullptr;
        T* to_x = x_bar ? x_bar + row * n : nullptr;
        const C r = rstd[row];
        vec<C> dh_h{}, a_h{}, a_dh{}, bdy_h{};
        for_each_vector<C>(0, n, [&](int64_t i, int64_t k) {
            const vec<C> d = read(dyr + i, k), dh = read(weight + i, k) * d, h = read(xr + i, k) * r;
            const vec<C> of_a = read_or_zero(ar, i, k);
            dh_h += dh * h;
            a_h += of_a * h;
            a_dh += of_a * dh;
            bdy_h += read_or_zero(b, i, k) * d * h;
        });
        const C m = sum_lanes<C>(dh_h) / C(n), p = sum_lanes<C>(a_h) / C(n);
        const bool stream_dy = past_caches && streamable(to_dy), stream_x = past_caches && streamable(to_x);
        const C of_h = sum_lanes<C>(bdy_h) / C(n) + r * (sum_lanes<C>(a_dh) / C(n) - C(3) * m * p);
        for_each_vector<C>(0, n, [=](int64_t i, int64_t k) {
            const vec<C> d = read(dyr + i, k), w = read(weight + i, k), h = read(xr + i, k) * r;
            const vec<C> of_a = read_or_zero(ar, i, k), of_b = read_or_zero(b, i, k);
            const vec<C> to_dh = r * (of_a - h * p);
            if (to_dy) write(to_dy + i, to_dh * w + of_b * h + read_or_zero(zr, i, k), k, stream_dy);
            if (to_x) write(to_x + i, r * (of_b * d - r * (m * of_a + p * w * d) - h * of_h), k, stream_x);
            if (sum) write(sum + i, read(sum + i, k) + to_dh * d, k);
        });
    });
}

}  // namespace

void rms_norm_forward(Dtype dtype, const void* x, int64_t x_stride, const void* weight, const void* residual,
                      int64_t residual_stride, void* y, void* rstd, bool past_caches, int64_t rows, int64_t n,
                      double eps) {
    dispatch(dtype, [&](auto element) {
        using T = decltype(element);
        using C = compute_t<T>;
        forward<T>(static_cast<const T*>(x), x_stride, static_cast<const C*>(weight),
                   static_cast<const T*>(residual), residual_stride, static_cast<T*>(y),
                   static_cast<C*>(rstd), past_caches, rows, n, static_cast<C>(eps));
    });
}

void rms_norm_backward(Dtype dtype, const void* dy, int64_t dy_stride, const void* x, int64_t x_stride,
                       const void* weight, const void* rstd, void* dx, void* dw, void* d_residual,
                       void* partial, bool past_caches, int64_t rows, int64_t n) {
    dispatch(dtype, [&](auto element) {
        using T = decltype(element);
        using C = compute_t<T>;
        backward<T>(static_cast<const T*>(dy), dy_stride, static_cast<const T*>(x), x_stride,
                    static_cast<const C*>(weight), static_cast<const C*>(rstd), static_cast<T*>(dx),
                    static_cast<C*>(dw), static_cast<T*>(d_residual), static_cast<C*>(partial), past_caches,
                    rows, n);
    });
}

void rms_norm_double_backward(Dtype dtype, const void* a, int64_t a_stride, const void* b, const void* z,
                              int64_t z_stride, const void* dy, int64_t dy_stride, const void* x,
                              int64_t x_stride, const void* weight, const void* rstd, void* dy_bar,
                              void* x_bar, void* w_bar, void* partial, bool past_caches, int64_t rows,
                              int64_t n) {
    dispatch(dtype, [&](auto element) {
        using T = decltype(element);
        using C = compute_t<T>;
        double_backward<T>(static_cast<const T*>(a), a_stride, static_cast<const C*>(b),
                           static_cast<const T*>(z), z_stride, static_cast<const T*>(dy), dy_stride,
                           static_cast<const T*>(x), x_stride, static_cast<const C*>(weight),
                           static_cast<const C*>(rstd), static_cast<T*>(dy_bar), static_cast<T*>(x_bar),
                           static_cast<C*>(w_bar), static_cast<C*>(partial), past_caches, rows, n);
    });
}

}  // namespace ttt::TTT_ISA
