// What threads do together: sums in a fixed order within a warp and a block, and a barrier of the whole grid.
#pragma once

#include <cuda_runtime.h>

#include "common/scalar.h"

namespace ttt::cuda {

constexpr int kWarp = 32;
constexpr unsigned kWholeWarp = 0xffffffffu;

// Adds to a counter in global memory; what this thread has seen and written is visible to who reads the sum.
__device__ inline unsigned add_release(unsigned* counter, unsigned amount) {
#ifdef __CUDA_ARCH__
    unsigned before;
    asm volatile("atom.add.acq_rel.gpu.u32 %0, [%1], %2;"
                 : "=r"(before)
                 : "l"(counter), "r"(amount)
                 : "memory");
    return before;
#else
    return __atomic_fetch_add(counter, amount, __ATOMIC_ACQ_REL);
#endif
}

// Reads a counter; what came before the additions that it holds is visible from here on.
__device__ inline unsigned load_acquire(const unsigned* counter) {
#ifdef __CUDA_ARCH__
    unsigned value;
    asm volatile("ld.acquire.gpu.u32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
    return value;
#else
    return __atomic_load_n(counter, __ATOMIC_ACQUIRE);
#endif
}

// What a thread does between two looks at memory that another is to change. A GPU runs others by itself.
__device__ inline void between_looks() {
#ifndef __CUDA_ARCH__
    __nanosleep(0);
#endif
}

// A barrier of so many threads of a block, in whole warps; barrier 0 is that of __syncthreads.
__device__ inline void barrier_of_some(int number, int threads) {
#ifdef __CUDA_ARCH__
    asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
#elif !defined(__CUDACC__)
    cuda_on_host::wait_for_block(number, static_cast<unsigned>(threads));
#endif
}

// Returns when every block of a cooperative launch has called it, by all threads that `together` is a barrier
// of, thread 0 among them; what they wrote before, to global memory as well, is then visible to all (by
// ordinary loads, not by those that assume read-only memory).
//
// The counter is 4 bytes of global memory, zero before its first use and never set again: the first block
// adds 2^31 less the number of the others and every other block 1, so that when all have come the lower 31
// bits are zero again and the top bit has turned. The next barrier, of this launch, of another or of a
// graph's replay, starts from there, whatever its number of blocks. Launches that may run at once need
// counters of their own.
template <class Together>
__device__ inline void grid_barrier(unsigned* counter, Together together) {
    together();
    if (threadIdx.x == 0 && threadIdx.y == 0 && threadIdx.z == 0) {
        const unsigned blocks = gridDim.x * gridDim.y * gridDim.z;
        const bool first = blockIdx.x == 0 && blockIdx.y == 0 && blockIdx.z == 0;
        constexpr unsigned kTop = 0x80000000u;
        const unsigned before = add_release(counter, first ? kTop - (blocks - 1) : 1u);
        while (((load_acquire(counter) ^ before) & kTop) == 0) between_looks();
    }
    together();
}
__device__ inline void grid_barrier(unsigned* counter) {
    grid_barrier(counter, [] { __syncthreads(); });
}

// Each of these combines the values of all lanes, or threads, and gives every one of them the same bits: at
// each step, both partners of a pair combine the same two values, and combine(a, b) must equal combine(b, a).
template <class C, class Combine>
__device__ inline C warp_reduce(C value, Combine combine) {
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2)
        value = combine(value, __shfl_xor_sync(kWholeWarp, value, step));
    return value;
}

struct Sum {
    template <class C>
    __device__ C operator()(C a, C b) const {
        return a + b;
    }
};
struct Max {
    template <class C>
    __device__ C operator()(C a, C b) const {
        return a > b || a != a ? a : b;  // NaN stays
    }
};

// Sums of kSums values of each lane over the warp, of which a lane gets that of number lane / (kWarp /
// kSums): with the bits of warp_reduce, in fewer exchanges, because lanes share out the sums among them.
template <int kSums>
__device__ inline float warp_sums(float (&values)[kSums]) {
    static_assert(kSums > 0 && kWarp % kSums == 0, "as many lanes for each sum");
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    int left = kSums;
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2) {
        const bool upper = lane & step;
        if (left == 1) values[0] += __shfl_xor_sync(kWholeWarp, values[0], step);
        left /= 2;
#pragma unroll
        for (int i = 0; i < kSums / 2; ++i) {
            if (i >= left) continue;
            const float mine = upper ? values[left + i] : values[i];
            const float theirs = upper ? values[i] : values[left + i];
            values[i] = mine + __shfl_xor_sync(kWholeWarp, theirs, step);
        }
        left = left ? left : 1;
    }
    return values[0];
}

// Of a block of kThreads in x, whole warps; `scratch` is shared memory for a value of each warp, which may be
// used again at once. `neutral` changes nothing that it is combined with.
template <int kThreads, class C, class Combine>
__device__ inline C block_reduce(C value, C* scratch, C neutral, Combine combine) {
    static_assert(kThreads % kWarp == 0 && kThreads <= kWarp * kWarp, "a block of up to 32 whole warps");
    constexpr int kWarps = kThreads / kWarp;
    const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
    value = warp_reduce(value, combine);
    if (lane == 0) scratch[warp] = value;
    __syncthreads();
    value = warp_reduce(lane < kWarps ? scratch[lane] : neutral, combine);
    __syncthreads();
    return value;
}

}  // namespace ttt::cuda
