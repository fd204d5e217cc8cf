// Kernels of swiglu, between its matrix products. Every array is contiguous, `count` elements of one type.
#pragma once

#define TTT_DECLARE_SWIGLU                                                                                  \
    /* gate, up -> hidden = silu(gate) * up */                                                              \
    void swiglu_forward(Dtype dtype, const void* gate, const void* up, void* hidden, int64_t count);        \
    /* d_hidden, gate, up -> d_gate, d_up, and hidden once more unless null */                              \
    void swiglu_backward(Dtype dtype, const void* d_hidden, const void* gate, const void* up, void* d_gate, \
                         void* d_up, void* hidden, int64_t count);

#define TTT_LIST_SWIGLU(X) \
    X(swiglu_forward)      \
    X(swiglu_backward)
