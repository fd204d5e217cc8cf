// Kernels of linear_ce, between the matrix products of one block of the vocabulary. `logits` (rows, cols) is
// contiguous and belongs to the classes [first, first + cols); target (rows) holds -1 where a row has none.
// Everything per row is in C.
#pragma once

#define TTT_DECLARE_LINEAR_CE                                                                                \
    /* Updates over blocks, from -inf, 0, 0 and 0: each row's maximum, its sum of e^(logit - maximum), that  \
       sum without the target's, and the target's logit. With acc (rows, width) in C, unless null, scaled by \
       e^(old maximum - new maximum), logits become e^(logit - maximum), and 0 at the target. */             \
    void linear_ce_online(Dtype dtype, void* logits, int64_t rows, int64_t cols, int64_t first,              \
                          const int64_t* target, void* maximum, void* sum, void* others, void* picked,       \
                          void* acc, int64_t width);                                                         \
    /* logits become d_nll * (e^(logit - lse) - [the class is the target]) */                                \
    void linear_ce_d_logits(Dtype dtype, void* logits, int64_t rows, int64_t cols, int64_t first,            \
                            const int64_t* target, const void* lse, const void* d_nll);                      \
    /* With along (rows, cols), tangents of the logits, and P = e^(logit - lse): logits become d_nll * (P -  \
       [the class is the target]), and along becomes d_nll P (along - mean). */                              \
    void linear_ce_second(Dtype dtype, void* logits, void* along, int64_t rows, int64_t cols, int64_t first, \
                          const int64_t* target, const void* lse, const void* mean, const void* d_nll);

#define TTT_LIST_LINEAR_CE(X) \
    X(linear_ce_online)       \
    X(linear_ce_d_logits)     \
    X(linear_ce_second)
