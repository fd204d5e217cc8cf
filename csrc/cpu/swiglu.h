// Kernels of swiglu, between its matrix products. Every array is contiguous with `count` elements, of `dtype`
// or of `product`, the type that matrix products are in: `dtype` itself, or what it is computed in.
#pragma once

#define TTT_DECLARE_SWIGLU                                                                                   \
    /* gate, up, in product -> hidden = silu(gate) * up, in product; gate and up in dtype unless null */     \
    void swiglu_forward(Dtype dtype, Dtype product, const void* gate, const void* up, void* hidden,          \
                        void* kept_gate, void* kept_up, int64_t count);                                      \
    /* gate, up in dtype, d_hidden in product, and gate_bar and up_bar in dtype, null for zero ->            \
       in product: d_gate + gate_bar, d_up + up_bar, and hidden; each unless null */                         \
    void swiglu_backward(Dtype dtype, Dtype product, const void* gate, const void* up, const void* d_hidden, \
                         const void* gate_bar, const void* up_bar, void* d_gate, void* d_up, void* hidden,   \
                         int64_t count);                                                                     \
    /* besides h_bar, t_gate and t_up in product, null for zero: the cotangent of hidden that dw_down's      \
       gives, and the tangents of gate and up -> in product, each unless null: hidden's tangent, the         \
       cotangents of gate and up, and what backward gives. Results may be written over what has their type.  \
     */                                                                                                      \
    void swiglu_double_backward(Dtype dtype, Dtype product, const void* gate, const void* up,                \
                                const void* d_hidden, const void* h_bar, const void* t_gate,                 \
                                const void* t_up, void* t_hidden, void* gate_bar, void* up_bar,              \
                                void* d_gate, void* d_up, void* hidden, int64_t count);

#define TTT_LIST_SWIGLU(X) \
    X(swiglu_forward)      \
    X(swiglu_backward)     \
    X(swiglu_double_backward)
