// Whether the runtime that the kernels are linked with and the driver that is here go together.
#pragma once

#include <string>

#define TTT_DECLARE_CUDA_DRIVER                                                                          \
    /* Why the runtime cannot use the GPUs that are here, or nothing: a driver may be too old for it. */ \
    std::string unusable();

#define TTT_LIST_CUDA_DRIVER(X) X(unusable)
