#include <cuda_runtime.h>

#include "cuda/kernels.h"

namespace ttt::cuda {

std::string unusable() {
    int devices = 0;
    const cudaError_t found = cudaGetDeviceCount(&devices);
    return found == cudaSuccess ? "" : cudaGetErrorString(found);
}

}  // namespace ttt::cuda
