// What the host's side of the kernels uses of CUDA's runtime, with the refusals that a device would give.
#pragma once

#include <algorithm>
#include <cstddef>
#include <map>
#include <type_traits>

#include "device.h"

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorCooperativeLaunchTooLarge = 720,
};
inline const char* cudaGetErrorString(cudaError_t error) {
    switch (error) {
        case cudaSuccess:
            return "no error";
        case cudaErrorInvalidValue:
            return "invalid argument";
        case cudaErrorInvalidConfiguration:
            return "invalid configuration argument";
        case cudaErrorCooperativeLaunchTooLarge:
            return "too many blocks in cooperative launch";
    }
    return "unknown error";
}
inline cudaError_t cudaGetLastError() {
    return cudaSuccess;
}

struct CUstream_st;
using cudaStream_t = CUstream_st*;

enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative = 2 };
union cudaLaunchAttributeValue {
    int cooperative;
};
struct cudaLaunchAttribute {
    cudaLaunchAttributeID id;
    cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes = 0;
    cudaStream_t stream = nullptr;
    cudaLaunchAttribute* attrs = nullptr;
    unsigned numAttrs = 0;
};

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaDeviceAttr {
    cudaDevAttrMultiProcessorCount = 16,
    cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};

namespace cuda_on_host {

// Those of sm_90.
constexpr size_t kSharedOfBlock = 227 * 1024;
constexpr unsigned kThreadsOfBlock = 1024, kThreadsOfProcessor = 2048, kBlocksOfProcessor = 32;

// Bytes of dynamic shared memory that a kernel has been allowed.
inline std::map<const void*, size_t>& allowed() {
    static std::map<const void*, size_t> all;
    return all;
}
inline int blocks_of_processor(unsigned threads, size_t shared) {
    const size_t by_shared = kSharedOfBlock / std::max<size_t>(shared, 1);
    return static_cast<int>(
        std::min<size_t>({by_shared, kThreadsOfProcessor / std::max(threads, 1u), kBlocksOfProcessor}));
}

}  // namespace cuda_on_host

inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
    if (bytes < 0 || static_cast<size_t>(bytes) > cuda_on_host::kSharedOfBlock) return cudaErrorInvalidValue;
    cuda_on_host::allowed()[kernel] = static_cast<size_t>(bytes);
    return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}
inline cudaError_t cudaGetDeviceCount(int* devices) {
    *devices = 1;
    return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    const bool of_block = attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin;
    *value = of_block ? static_cast<int>(cuda_on_host::kSharedOfBlock) : cuda_on_host::processors;
    return cudaSuccess;
}
template <class... Parameters>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void (*)(Parameters...), int threads,
                                                          size_t shared) {
    *blocks = cuda_on_host::blocks_of_processor(static_cast<unsigned>(threads), shared);
    return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
    const dim3 &grid = config->gridDim, &block = config->blockDim;
    const unsigned blocks = grid.x * grid.y * grid.z, threads = block.x * block.y * block.z;
    if (!blocks || !threads || threads > cuda_on_host::kThreadsOfBlock) return cudaErrorInvalidConfiguration;
    const auto own = cuda_on_host::allowed().find(reinterpret_cast<const void*>(kernel));
    const size_t most = own == cuda_on_host::allowed().end() ? 48 * 1024 : own->second;
    if (config->dynamicSmemBytes > std::max<size_t>(most, 48 * 1024)) return cudaErrorInvalidValue;
    bool cooperative = false;
    for (unsigned i = 0; i < config->numAttrs; ++i) cooperative |= config->attrs[i].val.cooperative != 0;
    const int resident =
        cuda_on_host::processors * cuda_on_host::blocks_of_processor(threads, config->dynamicSmemBytes);
    if (cooperative && blocks > static_cast<unsigned>(resident)) return cudaErrorCooperativeLaunchTooLarge;
    // Blocks that need not be resident together may not wait for each other: some wait for all others to end.
    const unsigned at_once = cooperative ? blocks : cuda_on_host::order > 1 ? 2 : 1;
    const auto call = [&](std::decay_t<Parameters>... copies) {
        cuda_on_host::run(
            {{grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, config->dynamicSmemBytes, at_once},
            [&] { kernel(copies...); });
    };
    call(std::forward<Arguments>(arguments)...);
    return cudaSuccess;
}
