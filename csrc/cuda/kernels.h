// Every kernel of the CUDA backend as Python calls it. An operator's header has the declarations and their
// list; its .cu file defines them. Pointers are to the first element in the device's memory where nothing
// else is said, strides and sizes count elements, and `stream` is a cudaStream_t. Nothing waits for the
// device, nothing is allocated, and an error of the runtime is thrown as a std::runtime_error that names the
// kernel.
#pragma once

#include <cstdint>

#include "common/scalar.h"
#include "cuda/clipped_sgd.h"
#include "cuda/decode.h"
#include "cuda/driver.h"

#define TTT_DECLARE_CUDA_KERNELS \
    TTT_DECLARE_CUDA_CLIPPED_SGD \
    TTT_DECLARE_CUDA_DECODE      \
    TTT_DECLARE_CUDA_DRIVER

#define TTT_CUDA_KERNELS(X)      \
    TTT_LIST_CUDA_CLIPPED_SGD(X) \
    TTT_LIST_CUDA_DECODE(X)      \
    TTT_LIST_CUDA_DRIVER(X)

namespace ttt::cuda {
TTT_DECLARE_CUDA_KERNELS
}
