// Kernels of decode on CUDA. The table of layers is that of common/decode_layer.h, in the device's memory.
#pragma once

#include "common/decode_layer.h"

#define TTT_DECLARE_CUDA_DECODE                                                                              \
    /* How many bytes decode_step needs in its scratch, which is zero before its first use, or 0 if the */   \
    /* current device has not the shared memory for so many sequences of such width. */                      \
    int64_t decode_scratch_bytes(Dtype dtype, int64_t n_layers, int64_t batch, int64_t d, int64_t heads,     \
                                 int64_t intermediate);                                                      \
    /* One token through all layers: x (batch, d); cos, sin (batch, D / 2); visible (n_layers, 2): the */    \
    /* cache row that the token's key and value are written to, and how many keys it sees, which end */      \
    /* there; head (vocab, d) -> prefix_output (batch, d), x after n_prefix layers; hidden (batch, d), */    \
    /* normalized; logits (batch, vocab) in float. Not for double, for up to 8 sequences, d up to 3072, D */ \
    /* up to 256; d, D and the intermediate size are multiples of 8, all addresses but those of */           \
    /* q_norm, k_norm, cos and sin and all strides are of 16 bytes. Launches that share scratch may not */   \
    /* run at once. */                                                                                       \
    void decode_step(Dtype dtype, const int64_t* layers, const int64_t* visible, int64_t n_layers,           \
                     int64_t n_prefix, const void* x, const float* cos, const float* sin,                    \
                     const float* final_norm, const void* head, void* prefix_output, void* hidden,           \
                     float* logits, void* scratch, int64_t batch, int64_t d, int64_t heads,                  \
                     int64_t intermediate, int64_t vocab, double eps, void* stream);

#define TTT_LIST_CUDA_DECODE(X) \
    X(decode_scratch_bytes)     \
    X(decode_step)
