// What a layer of decode is made of, as processors and GPUs find it.
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
