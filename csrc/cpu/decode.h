// Kernels of decode.
#pragma once

#include "common/decode_layer.h"

#define TTT_DECLARE_DECODE                                                                                \
    /* One token through all layers: x (batch, d); cos, sin (batch, D / 2); visible (n_layers, 2): the */ \
    /* cache row that the token's key and value are written to, and how many keys it sees, which end */   \
    /* there; head (vocab, d) -> prefix_output (batch, d), x after n_prefix layers; hidden (batch, d), */ \
    /* normalized; logits (batch, vocab) in float. Not for double. */                                     \
    void decode_step(Dtype dtype, const int64_t* layers, const int64_t* visible, int64_t n_layers,        \
                     int64_t n_prefix, const void* x, const float* cos, const float* sin,                 \
                     const float* final_norm, const void* head, void* prefix_output, void* hidden,        \
                     float* logits, int64_t batch, int64_t d, int64_t heads, int64_t intermediate,        \
                     int64_t vocab, double eps);

#define TTT_LIST_DECODE(X) X(decode_step)
