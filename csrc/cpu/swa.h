// Kernels of swa. q, o (B, Tq, H, D), k, v (B, Tk, Hk, D) with unit stride in D and a stride for each of the
// other dimensions (_b, _t, _h). Query i of sequence b sees the keys [first[b * first_b + i], Tk - Tq + i];
// first does not fall as i grows. Keys before first[b * first_b] are never read.
#pragma once

#define TTT_DECLARE_SWA                                                                                      \
    /* -> o (B, Tq, H, D), contiguous; o_rest, alike, what o lost to rounding, or null;                      \
       lse (B, H, Tq) in C: log of the sum of e^score, -inf without keys. */                                 \
    void swa_forward(Dtype dtype, const void* q, int64_t q_b, int64_t q_t, int64_t q_h, const void* k,       \
                     int64_t k_b, int64_t k_t, int64_t k_h, const void* v, int64_t v_b, int64_t v_t,         \
                     int64_t v_h, const int64_t* first, int64_t first_b, void* o, void* o_rest, void* lse,   \
                     int64_t B, int64_t Tq, int64_t Tk, int64_t H, int64_t Hk, int64_t D, double scale);     \
    /* -> dq (B, Tq, H, D), contiguous; dk, dv (B, Tk - key_start, Hk, D) in C, contiguous, added to: the    \
       gradients of the keys and values from key_start on; each may be null. lse and o_rest as forward gave  \
       them. */                                                                                              \
    void swa_backward(Dtype dtype, const void* d_o, int64_t do_b, int64_t do_t, int64_t do_h, const void* q, \
                      int64_t q_b, int64_t q_t, int64_t q_h, const void* k, int64_t k_b, int64_t k_t,        \
                      int64_t k_h, const void* v, int64_t v_b, int64_t v_t, int64_t v_h,                     \
                      const int64_t* first, int64_t first_b, const void* o, int64_t o_b, int64_t o_t,        \
                      int64_t o_h, const void* o_rest, int64_t rest_b, int64_t rest_t, int64_t rest_h,       \
                      const void* lse, void* dq, void* dk, void* dv, int64_t B, int64_t Tq, int64_t Tk,      \
                      int64_t H, int64_t Hk, int64_t D, int64_t key_start, double scale);                    \
    /* a (like q), b, c (B, Tk - key_start, Hk, D): cotangents of dq, dk and dv, null for zero -> do_bar,    \
       q_bar (B, Tq, H, D), contiguous; k_bar, v_bar (B, Tk, Hk, D) in C, contiguous, added to: the          \
       cotangents of d_o, q, k and v; each may be null. With x (like q), a cotangent of o, its gradients are \
       in the last three. dq, dk, dv as swa_backward gives them for d_o; each may be null. Without tangent:  \
       do_rest, what do_bar lost to rounding, and r (B, H, Tq) in C, each may be null. With tangent and      \
       tangent_rest, which are do_bar and do_rest as another call gave them, r is read; do_bar and do_rest   \
       are null. */                                                                                          \
    void swa_double_backward(                                                                                \
        Dtype dtype, const void* a, int64_t a_b, int64_t a_t, int64_t a_h, const void* b, int64_t b_b,       \
        int64_t b_t, int64_t b_h, const void* c, int64_t c_b, int64_t c_t, int64_t c_h, const void* x,       \
        int64_t x_b, int64_t x_t, int64_t x_h, const void* d_o, int64_t do_b, int64_t do_t, int64_t do_h,    \
        const void* q, int64_t q_b, int64_t q_t, int64_t q_h, const void* k, int64_t k_b, int64_t k_t,       \
        int64_t k_h, const void* v, int64_t v_b, int64_t v_t, int64_t v_h, const int64_t* first,             \
        int64_t first_b, const void* o, int64_t o_b, int64_t o_t, int64_t o_h, const void* o_rest,           \
        int64_t rest_b, int64_t rest_t, int64_t rest_h, const void* tangent, int64_t tangent_b,              \
        int64_t tangent_t, int64_t tangent_h, const void* tangent_rest, int64_t tr_b, int64_t tr_t,          \
        int64_t tr_h, const void* lse, void* r, void* do_bar, void* do_rest, void* q_bar, void* k_bar,       \
        void* v_bar, void* dq, void* dk, void* dv, int64_t B, int64_t Tq, int64_t Tk, int64_t H, int64_t Hk, \
        int64_t D, int64_t key_start, double scale);

#define TTT_LIST_SWA(X) \
    X(swa_forward)      \
    X(swa_backward)     \
    X(swa_double_backward)
