// Kernels of RMSNorm. Rows of n elements are a stride of their own apart; results are contiguous. weight and
// what has its shape are in C, and so is rstd (rows). Sums over rows are made of sums over 32 rows, whose
// number and order depend on nothing else: `partial` is memory for them, (rows / 32 rounded up, n) in C.
#pragma once

#define TTT_DECLARE_RMS_NORM                                                                                \
    /* x, residual (rows, n; null for zero) -> y (rows, n), rstd */                                         \
    void rms_norm_forward(Dtype dtype, const void* x, int64_t x_stride, const void* weight,                 \
                          const void* residual, int64_t residual_stride, void* y, void* rstd,               \
                          bool past_caches, int64_t rows, int64_t n, double eps);                           \
    /* -> dx, d_residual (rows, n), dw (n); each unless null */                                             \
    void rms_norm_backward(Dtype dtype, const void* dy, int64_t dy_stride, const void* x, int64_t x_stride, \
                           const void* weight, const void* rstd, void* dx, void* dw, void* d_residual,      \
                           void* partial, bool past_caches, int64_t rows, int64_t n);                       \
    /* a, z (rows, n) and b (n): cotangents of dx, of the residual's gradient and of dw, null for zero ->   \
       dy_bar, x_bar (rows, n), w_bar (n): those of dy, x and weight, unless null */                        \
    void rms_norm_double_backward(Dtype dtype, const void* a, int64_t a_stride, const void* b,              \
                                  const void* z, int64_t z_stride, const void* dy, int64_t dy_stride,       \
                                  const void* x, int64_t x_stride, const void* weight, const void* rstd,    \
                                  void* dy_bar, void* x_bar, void* w_bar, void* partial, bool past_caches,  \
                                  int64_t rows, int64_t n);

#define TTT_LIST_RMS_NORM(X) \
    X(rms_norm_forward)      \
    X(rms_norm_backward)     \
    X(rms_norm_double_backward)
