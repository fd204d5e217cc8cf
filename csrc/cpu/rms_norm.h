// Kernels of RMSNorm.
#pragma once

#define TTT_DECLARE_RMS_NORM                                                                                \
    /* x (rows, n) with rows x_stride apart, weight (n) in C -> y (rows, n), rstd (rows) in C */            \
    void rms_norm_forward(Dtype dtype, const void* x, int64_t x_stride, const void* weight, void* y,        \
                          void* rstd, int64_t rows, int64_t n, double eps);                                 \
    /* -> dx (rows, n) unless null; dw (n) in C unless null */                                              \
    void rms_norm_backward(Dtype dtype, const void* dy, int64_t dy_stride, const void* x, int64_t x_stride, \
                           const void* weight, const void* rstd, void* dx, void* dw, int64_t rows,          \
                           int64_t n);

#define TTT_LIST_RMS_NORM(X) \
    X(rms_norm_forward)      \
    X(rms_norm_backward)
