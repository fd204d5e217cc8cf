// Kernels of clipped_sgd. Rows are sequences; the rows of every tensor are a stride of their own apart.
#pragma once

#define TTT_DECLARE_CLIPPED_SGD                                                                            \
    /* g, l, u (rows, n; l and u may be null) -> adds to dots (4, rows): g . g, g . l, g . u, l . u, those \
       that there are. scratch (4, rows, n / 8192 rounded up) */                                           \
    void clipped_sgd_dots(Dtype dtype, const void* g, int64_t g_stride, const void* l, int64_t l_stride,   \
                          const void* u, int64_t u_stride, double* scratch, double* dots, int64_t rows,    \
                          int64_t n);                                                                      \
    /* out = a_factor a + b_factor b + c_factor c with one factor per row, c null for zero, and copy (in   \
       copy_dtype) unless null; rows that are not active (null: all are) keep what out and copy hold. out  \
       may be a. */                                                                                        \
    void clipped_sgd_combine(Dtype dtype, const void* a, int64_t a_stride, const double* a_factor,         \
                             const void* b, int64_t b_stride, const double* b_factor, const void* c,       \
                             int64_t c_stride, const double* c_factor, const bool* active, void* out,      \
                             int64_t out_stride, Dtype copy_dtype, void* copy, int64_t copy_stride,        \
                             int64_t rows, int64_t n);

#define TTT_LIST_CLIPPED_SGD(X) \
    X(clipped_sgd_dots)         \
    X(clipped_sgd_combine)
