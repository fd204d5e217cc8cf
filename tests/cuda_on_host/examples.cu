// Kernels that a missing barrier makes wrong, to show that the emulation finds it, and the barrier of the
// grid.
#include "cuda/async_copy.h"
#include "cuda/grid.h"
#include "cuda/launch.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void set_order(unsigned order) {
    cuda_on_host::order = order;
}
EXPORT void set_processors(int processors) {
    cuda_on_host::processors = processors;
}
EXPORT void set_copies_in_bulk(int in_bulk) {
    cuda_on_host::copies_in_bulk = in_bulk != 0;
}
EXPORT long long copied_bytes() {
    return cuda_on_host::copied_bytes;
}

namespace {

using namespace ttt::cuda;

thread_local std::string error;

// 0, or 1 where `f` throws, with what it says in `error`.
template <class F>
int caught(F f) {
    try {
        f();
        return 0;
    } catch (const std::exception& e) {
        error = e.what();
        return 1;
    }
}

constexpr int kThreads = 96;

// Every block reverses its values by way of shared memory.
__global__ void reverse(const float* in, float* out, bool with_barrier) {
    float* values = reinterpret_cast<float*>(dynamic_shared());
    const unsigned thread = threadIdx.x, first = blockIdx.x * blockDim.x;
    values[thread] = in[first + thread];
    if (with_barrier) __syncthreads();
    out[first + thread] = values[blockDim.x - 1 - thread];
}

__global__ void sums(const double* in, double* out) {
    double* scratch = reinterpret_cast<double*>(dynamic_shared());
    const double sum = block_reduce<kThreads>(in[blockIdx.x * kThreads + threadIdx.x], scratch, 0.0, Sum{});
    const double most =
        block_reduce<kThreads>(in[blockIdx.x * kThreads + threadIdx.x], scratch, -1e300, Max{});
    out[blockIdx.x * kThreads + threadIdx.x] = sum * most;
}

// Each round, every thread adds the value that the next block's next thread had to its own; kWarp threads.
__global__ void rounds(const float* in, float* buffers, unsigned* counter, int count, bool with_barrier) {
    const unsigned own = blockIdx.x * kWarp + threadIdx.x, values = gridDim.x * kWarp;
    const unsigned other = (blockIdx.x + 1) % gridDim.x * kWarp + (threadIdx.x + 1) % kWarp;
    for (int round = 0; round < count; ++round) {
        const float* from = round ? buffers + static_cast<unsigned>(round % 2) * values : in;
        float* to = buffers + static_cast<unsigned>((round + 1) % 2) * values;
        to[own] = from[own] + from[other];
        if (with_barrier) grid_barrier(counter);
    }
}

// A warp's values by way of shared memory, twice: two lanes ask for the two halves, in two pieces each.
__global__ void copied(const float* in, float* out, bool waits) {
    PhaseBarrier* const barriers = reinterpret_cast<PhaseBarrier*>(dynamic_shared());
    float* const values = reinterpret_cast<float*>(barriers + 2);
    const int thread = static_cast<int>(threadIdx.x), half = thread / (kWarp / 2);
    if (thread == 0) {
        for (int i = 0; i < 2; ++i) make_barrier(barriers + i, arrivals_of_copies());
        show_barriers_to_copies();
    }
    __syncthreads();
    const int bytes = kWarp / 2 * static_cast<int>(sizeof(float));
    for (unsigned turn = 0; turn < (waits ? 2 : 1); ++turn) {
        const char* from = reinterpret_cast<const char*>(in + turn * kWarp) + half * bytes;
        unsigned char* const to = reinterpret_cast<unsigned char*>(values) + half * bytes;
        begin_copies(thread % (kWarp / 2) == 3,
                     Copies<2>{to, {from, from + bytes / 2}, barriers + half, bytes / 2, bytes / 2});
        if (waits) wait_for_phase(barriers + half, turn % 2);
        out[turn * kWarp + threadIdx.x] = values[thread];
        __syncthreads();
    }
}

__global__ void faulty(int what, float* memory) {
    if (what == 0) memory[threadIdx.x] = __shfl_sync(threadIdx.x == 5 ? 0x10u : 0xffffffffu, 1.0f, 0);
    if (what == 1 && threadIdx.x % 2) __syncwarp();
    if (what == 2) dynamic_shared()[16] = 0;
    if (what == 3) memory[0] = __ldg(reinterpret_cast<const float4*>(memory + 1)).x;
    if (what == 4) grid_barrier(reinterpret_cast<unsigned*>(memory));
    PhaseBarrier* const barrier = reinterpret_cast<PhaseBarrier*>(dynamic_shared());
    if (what == 5) arrive(barrier);
    if (what == 6 && threadIdx.x == 0) {
        make_barrier(barrier, 1);
        announce(barrier, 16);
        arrive(barrier);
    }
    if (what == 7 && threadIdx.x == 0) copy_chunk(barrier, memory);
    if (what == 8 && threadIdx.x == 0) {
        make_barrier(barrier, 1);
        copy_in_bulk(barrier, memory, 8, barrier);
    }
}

}  // namespace

EXPORT const char* last_error() {
    return error.c_str();
}

EXPORT int run_reverse(const float* in, float* out, unsigned blocks, int with_barrier) {
    const Extent extent{blocks, kThreads, kThreads * sizeof(float)};
    return caught([&] { launch("reverse", reverse, extent, nullptr, in, out, with_barrier != 0); });
}
EXPORT int run_sums(const double* in, double* out, unsigned blocks) {
    const Extent extent{blocks, kThreads, kThreads / kWarp * sizeof(double)};
    return caught([&] { launch("sums", sums, extent, nullptr, in, out); });
}
EXPORT int run_rounds(const float* in, float* buffers, unsigned* counter, unsigned blocks, int count,
                      int with_barrier) {
    const Extent extent{blocks, kWarp, 0, true};
    return caught(
        [&] { launch("rounds", rounds, extent, nullptr, in, buffers, counter, count, with_barrier != 0); });
}
EXPORT int run_copied(const float* in, float* out, int waits) {
    const Extent extent{1, kWarp, 2 * sizeof(PhaseBarrier) + kWarp * sizeof(float)};
    return caught([&] { launch("copied", copied, extent, nullptr, in, out, waits != 0); });
}
EXPORT int run_faulty(int what, float* memory, unsigned threads, unsigned long shared) {
    const Extent extent{2, threads, shared};
    return caught([&] { launch("faulty", faulty, extent, nullptr, what, memory); });
}
