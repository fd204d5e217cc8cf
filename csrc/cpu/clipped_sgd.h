// Kernels of clipped_sgd. Rows are sequences; the rows of every tensor are a stride of their own apart.
#pragma once

#define TTT_DECLARE_CLIPPED_SGD                                                                           \
    /* a, b (rows, n) -> adds to dots (2, rows): a . a, and a . b unless b is null.                       \
       scratch (2, rows, n / 8192 rounded up) */                                                          \
    void clipped_sgd_dots(Dtype dtype, const void* a, int64_t a_stride, const void* b, int64_t b_stride,  \
                          double* scratch, double* dots, int64_t rows, int64_t n);                        \
    /* out = a_factor a + b_factor b with one factor per row, and copy (in copy_dtype) unless null; rows  \
       that are not active (null: all are) keep what out and copy hold. out may be a. */                  \
    void clipped_sgd_combine(Dtype dtype, const void* a, int64_t a_stride, const double* a_factor,        \
                             const void* b, int64_t b_stride, const double* b_factor, const bool* active, \
                             void* out, int64_t out_stride, Dtype copy_dtype, void* copy,                 \
                             int64_t copy_stride, int64_t rows, int64_t n);

#define TTT_LIST_CLIPPED_SGD(X) \
    X(clipped_sgd_dots)         \
    X(clipped_sgd_combine)
