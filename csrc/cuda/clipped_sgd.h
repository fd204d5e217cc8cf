// Kernels of clipped_sgd on CUDA. A tuple of tensors is a table in the host's memory with one row of int64
// for each, in the order of TTT_CLIPPED_SGD_TENSOR: the elements of a sequence, contiguous, and of the
// gradient g, the weight w and its copy the address and the elements between sequences.
#pragma once

#define TTT_CLIPPED_SGD_TENSOR(FIELD) \
    FIELD(count)                      \
    FIELD(g)                          \
    FIELD(g_stride)                   \
    FIELD(w)                          \
    FIELD(w_stride)                   \
    FIELD(copy)                       \
    FIELD(copy_stride)

#define TTT_DECLARE_CUDA_CLIPPED_SGD                                                                        \
    /* How many numbers clipped_sgd_update needs for each sequence in its scratch. */                       \
    int64_t clipped_sgd_parts(const int64_t* tensors, int64_t n_tensors);                                   \
    /* All tensors' new weights w - lr s g over the old and, unless their addresses are 0, into the copies; \
       norm (sequences). dtype is that of g and w, and neither it nor copy_dtype is double. lr is at lr_at  \
       if that is not null. max_norm 0 does not clip. Sequences that are not active (null: all are) keep    \
       what they have. scratch (sequences, parts). */                                                       \
    void clipped_sgd_update(Dtype dtype, Dtype copy_dtype, const int64_t* tensors, int64_t n_tensors,       \
                            int64_t sequences, double lr, Dtype lr_dtype, const void* lr_at,                \
                            double max_norm, const bool* active, int64_t active_stride, double* scratch,    \
                            float* norm, void* stream);

#define TTT_LIST_CUDA_CLIPPED_SGD(X) \
    X(clipped_sgd_parts)             \
    X(clipped_sgd_update)
