// Kernels of clipped_sgd. Rows are sequences; the rows of every tensor are a stride of their own apart.
#pragma once

#define TTT_DECLARE_CLIPPED_SGD                                                                              \
    /* g, l, u (rows, n; l and u may be null) -> adds to dots (4, rows): g . g, g . l, g . u, l . u, those   \
       that there are. scratch (4, rows, n / 8192 rounded up) */                                             \
    void clipped_sgd_dots(Dtype dtype, const void* g, int64_t g_stride, const void* l, int64_t l_stride,     \
                          const void* u, int64_t u_stride, double* scratch, double* dots, int64_t rows,      \
                          int64_t n);                                                                        \
    /* squares (rows): g . g -> norm, the factor s, and whether it clips. max_norm 0 does not. */            \
    void clipped_sgd_clips(const double* squares, double max_norm, double* norm, double* scale, bool* clips, \
                           int64_t rows);                                                                    \
    /* out = the sum of factor times input over those of w, l, u, g (rows, n) whose bit (1, 2, 4, 8) is set  \
       in uses, at least one, with the factors (4, rows) of `factors`; and copy (in copy_dtype) unless null. \
       more, unless null, likewise by uses_more and the next (4, rows) factors. Rows that are not active     \
       (null: all are) keep what the results hold. out may be an input if there is no more. */               \
    void clipped_sgd_combine(Dtype dtype, const void* w, int64_t w_stride, const void* l, int64_t l_stride,  \
                             const void* u, int64_t u_stride, const void* g, int64_t g_stride,               \
                             const double* factors, int uses, int uses_more, const bool* active, void* out,  \
                             int64_t out_stride, void* more, int64_t more_stride, Dtype copy_dtype,          \
                             void* copy, int64_t copy_stride, bool past_caches, int64_t rows, int64_t n);

#define TTT_LIST_CLIPPED_SGD(X) \
    X(clipped_sgd_dots)         \
    X(clipped_sgd_clips)        \
    X(clipped_sgd_combine)
