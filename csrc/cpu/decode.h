// Kernels of decode.
#pragma once

// The table of layers has one row of int64 for each, in this order: the addresses of its tensors, contiguous
// but for the caches; then the strides of the caches, in elements. Norms are (d) or (D) in float, matrices
// (out, in), fast matrices (batch, out, in), or 0 in a layer without them; caches are (batch, keys, H, D).
#define TTT_DECODE_LAYER(FIELD) \
    FIELD(seq_norm)             \
    FIELD(w_qkv)                \
    FIELD(q_norm)               \
    FIELD(k_norm)               \
    FIELD(w_o)                  \
    FIELD(seq_post_norm)        \
    FIELD(mlp_norm)             \
    FIELD(w_gate)               \
    FIELD(w_up)                 \
    FIELD(w_down)               \
    FIELD(mlp_post_norm)        \
    FIELD(fast_norm)            \
    FIELD(fast_gate)            \
    FIELD(fast_up)              \
    FIELD(fast_down)            \
    FIELD(fast_post_norm)       \
    FIELD(k_cache)              \
    FIELD(v_cache)              \
    FIELD(k_batch_stride)       \
    FIELD(k_key_stride)         \
    FIELD(v_batch_stride)       \
    FIELD(v_key_stride)

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
