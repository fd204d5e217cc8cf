// Kernels of rope.
#pragma once

#define TTT_DECLARE_ROPE                                                                                     \
    /* x (B, T, H, D), unit stride in D -> y likewise: pairs turned by the angles of cos, sin (T, D/2) in C, \
       or by their negatives. The tables of two sequences are table_b apart (0: shared). y may be x. */      \
    void rope_rotate(Dtype dtype, const void* x, int64_t x_b, int64_t x_t, int64_t x_h, const void* cos,     \
                     const void* sin, int64_t table_b, void* y, int64_t y_b, int64_t y_t, int64_t y_h,       \
                     int64_t B, int64_t T, int64_t H, int64_t D, bool interleaved, bool inverse,             \
                     bool past_caches);                                                                      \
    /* y = rotation of RMSNorm(x) over D with weight (D) in C; rstd (B, T, H) in C unless null */            \
    void rope_norm_rotate(Dtype dtype, const void* x, int64_t x_b, int64_t x_t, int64_t x_h,                 \
                          const void* weight, const void* cos, const void* sin, int64_t table_b, void* y,    \
                          int64_t y_b, int64_t y_t, int64_t y_h, void* rstd, int64_t B, int64_t T,           \
                          int64_t H, int64_t D, bool interleaved, double eps);

#define TTT_LIST_ROPE(X) \
    X(rope_rotate)       \
    X(rope_norm_rotate)
