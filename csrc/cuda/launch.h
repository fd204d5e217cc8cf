// Launching kernels from the host, every return code checked, and the one kind of shared memory they have.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <stdexcept>
#include <string>

#ifndef __CUDACC__
namespace cuda_on_host {
unsigned char* dynamic_shared();
}
#endif

namespace ttt::cuda {

// Throws what `call` returned for `kernel`, unless it succeeded.
inline void check(cudaError_t call, const char* kernel) {
    if (call != cudaSuccess)
        throw std::runtime_error(std::string("CUDA kernel ") + kernel + ": " + cudaGetErrorString(call));
}

// How much of a device a launch takes.
struct Extent {
    dim3 grid;
    dim3 block;
    std::size_t shared = 0;    // bytes of dynamic shared memory of a block
    bool cooperative = false;  // all blocks are resident at once, so that they may wait for each other
};

// What a block may have without asking.
constexpr std::size_t kSharedUnasked = 48 * 1024;

// The most dynamic shared memory that a block of the current device may ask for.
inline int most_shared(const char* kernel) {
    int device = 0, bytes = 0;
    check(cudaGetDevice(&device), kernel);
    check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), kernel);
    return bytes;
}

// Lets a kernel's launches have more than what is theirs unasked: as much as there is, because another thread
// may be between this and a launch that needs more than this one's.
template <class... Parameters>
void allow_shared(const char* name, void (*kernel)(Parameters...), std::size_t bytes) {
    if (bytes > kSharedUnasked)
        check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                   cudaFuncAttributeMaxDynamicSharedMemorySize, most_shared(name)),
              name);
}

// Launches a kernel on a stream (a cudaStream_t); `name` is for errors.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), const Extent& extent, void* stream,
            Arguments... arguments) {
    allow_shared(name, kernel, extent.shared);
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = extent.grid;
    config.blockDim = extent.block;
    config.dynamicSmemBytes = extent.shared;
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &attribute;
    config.numAttrs = extent.cooperative ? 1 : 0;
    check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), name);
}

// How many blocks of a kernel the current device holds at once: the most that a cooperative launch may have.
template <class... Parameters>
int resident_blocks(const char* name, void (*kernel)(Parameters...), int threads, std::size_t shared) {
    allow_shared(name, kernel, shared);
    int device = 0, processors = 0, of_each = 0;
    check(cudaGetDevice(&device), name);
    check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), name);
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&of_each, kernel, threads, shared), name);
    return processors * of_each;
}

// A block's dynamic shared memory, aligned for any element. Kernels have no other: its size is in one place.
__device__ inline unsigned char* dynamic_shared() {
#ifdef __CUDACC__
    extern __shared__ __align__(128) unsigned char memory[];
    return memory;
#else
    return cuda_on_host::dynamic_shared();
#endif
}

}  // namespace ttt::cuda
