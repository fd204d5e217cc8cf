// Copies from global to shared memory that go on by themselves, and barriers in shared memory that tell when
// they are through.
#pragma once

#include <cuda_runtime.h>

#include "common/scalar.h"
#include "cuda/grid.h"

namespace ttt::cuda {

// PTX's mbarrier. Its first phase is 0; a phase ends when as many arrivals as it was made for, and all bytes
// that were announced, have come.
struct PhaseBarrier {
    uint64_t state;
};

// Whether copies are made by a unit of the multiprocessor rather than by threads. Fences of a thread wait for
// what it has under way itself, and while memory is busy its other loads queue behind that.
__host__ __device__ inline bool copies_in_bulk() {
#ifdef __CUDA_ARCH__
    return __CUDA_ARCH__ >= 900;
#elif !defined(__CUDACC__)
    return cuda_on_host::copies_in_bulk;
#else
    return false;
#endif
}

#ifdef __CUDA_ARCH__
__device__ inline unsigned shared_address(const void* p) {
    return static_cast<unsigned>(__cvta_generic_to_shared(p));
}
#endif

__device__ inline void make_barrier(PhaseBarrier* barrier, unsigned arrivals) {
#ifdef __CUDA_ARCH__
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals)
                 : "memory");
#elif !defined(__CUDACC__)
    cuda_on_host::make_barrier(barrier, arrivals);
#endif
}

// After the last make_barrier, by who has made them; a barrier of the block must follow.
__device__ inline void show_barriers_to_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// What this thread has read and written before is through for who waits for the phase.
__device__ inline void arrive(PhaseBarrier* barrier) {
#ifdef __CUDA_ARCH__
    asm volatile(
        "{.reg .b64 state; mbarrier.arrive.shared::cta.b64 state, [%0];}" ::"r"(shared_address(barrier))
        : "memory");
#elif !defined(__CUDACC__)
    cuda_on_host::arrive(barrier, 0);
#endif
}

// Whether the phase of this parity has ended; of a barrier in its phase 0 that before it, of parity 1, has.
__device__ inline bool has_ended(const PhaseBarrier* barrier, unsigned parity) {
#ifdef __CUDA_ARCH__
    unsigned ended;
    asm volatile(
        "{.reg .pred p; mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
        : "=r"(ended)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
    return ended;
#elif !defined(__CUDACC__)
    return cuda_on_host::has_ended(barrier, parity);
#else
    return false;
#endif
}
__device__ inline void wait_for_phase(const PhaseBarrier* barrier, unsigned parity) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    // The thread sleeps for a while before it is told that the phase goes on.
    unsigned ended;
    do
        asm volatile(
            "{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
            : "=r"(ended)
            : "r"(shared_address(barrier)), "r"(parity)
            : "memory");
    while (!ended);
#else
    while (!has_ended(barrier, parity)) between_looks();
#endif
}

// kRows pieces of `bytes` each, one `apart` behind the other in shared memory, and the barrier whose phase
// they end. All addresses and sizes are multiples of 16 bytes.
template <int kRows>
struct Copies {
    unsigned char* to;
    const char* from[kRows];
    PhaseBarrier* end;
    int apart, bytes;
};
// Arrivals of the barrier that Copies end.
__device__ inline unsigned arrivals_of_copies() {
    return copies_in_bulk() ? 1 : kWarp;
}

namespace {

// Announces so many bytes and arrives.
__device__ inline void announce(PhaseBarrier* end, int bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(end)),
                 "r"(bytes)
                 : "memory");
#elif !defined(__CUDACC__)
    cuda_on_host::arrive(end, bytes);
#endif
}
__device__ inline void copy_in_bulk(void* to, const void* from, int bytes, PhaseBarrier* end) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
            shared_address(to)),
        "l"(from), "r"(bytes), "r"(shared_address(end))
        : "memory");
#elif !defined(__CUDACC__)
    cuda_on_host::copy_in_bulk(to, from, bytes, end);
#endif
}

// 16 bytes by this thread.
__device__ inline void copy_chunk(void* to, const void* from) {
#ifdef __CUDA_ARCH__
    // Past the first cache, where nothing will be read again; neighbouring bytes are wanted soon.
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from)
                 : "memory");
#elif !defined(__CUDACC__)
    cuda_on_host::copy_chunk(to, from);
#endif
}
// Arrives when the chunks that this thread has asked for are there.
__device__ inline void arrive_with_chunks(PhaseBarrier* end) {
#ifdef __CUDA_ARCH__
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(end))
                 : "memory");
#elif !defined(__CUDACC__)
    cuda_on_host::arrive_with_chunks(end);
#endif
}

template <class T>
__device__ inline T* of_lane(T* pointer, int lane) {
    const unsigned long long own = reinterpret_cast<uintptr_t>(pointer);
    return reinterpret_cast<T*>(static_cast<uintptr_t>(__shfl_sync(kWholeWarp, own, lane)));
}

}  // namespace

// Begins the copies of all lanes that ask for some; the whole warp must call it.
template <int kRows>
__device__ inline void begin_copies(bool asks, const Copies<kRows>& own) {
    if (copies_in_bulk()) {
        if (!asks) return;
        announce(own.end, kRows * own.bytes);
#pragma unroll
        for (int r = 0; r < kRows; ++r) copy_in_bulk(own.to + r * own.apart, own.from[r], own.bytes, own.end);
        return;
    }
    const int first = static_cast<int>(threadIdx.x) % kWarp * 16;
    // All lanes write what one has seen to be free. A vote is no fence.
    __syncwarp();
#pragma unroll 1
    for (unsigned left = __ballot_sync(kWholeWarp, asks); left; left &= left - 1) {
        const int lane = __ffs(static_cast<int>(left)) - 1;
        unsigned char* const to = of_lane(own.to, lane);
        PhaseBarrier* const end = of_lane(own.end, lane);
        const int bytes = __shfl_sync(kWholeWarp, own.bytes, lane);
        const char* from[kRows];
#pragma unroll
        for (int r = 0; r < kRows; ++r) from[r] = of_lane(own.from[r], lane);
#pragma unroll 1
        for (int i = first; i < bytes; i += kWarp * 16)
#pragma unroll
            for (int r = 0; r < kRows; ++r) copy_chunk(to + r * own.apart + i, from[r] + i);
        arrive_with_chunks(end);
    }
}

}  // namespace ttt::cuda
