// The execution model of CUDA on one thread of the host: every thread of a block is a fiber, which runs until
// it has to wait for others. In which order fibers run is chosen by the test, because no kernel may depend on
// it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace cuda_on_host {

struct Index {
    unsigned x, y, z;
};

// A launch, and what it may use.
struct Launch {
    Index grid, block;
    size_t shared;
    unsigned blocks_at_once;  // alive together; a cooperative launch has all of them
};

// Runs `body` once for every thread of a launch.
void run(const Launch& launch, const std::function<void()>& body);

// For running threads.
unsigned char* dynamic_shared();
void wait_for_block(int barrier, unsigned threads);  // 0 threads: all that have not ended
unsigned lane();
// What a lane gives to its warp and takes from it, when all lanes of `mask` have come.
struct Exchange {
    uint64_t value;
    unsigned source;    // the lane whose value it takes
    uint64_t received;  // that value
    unsigned votes;     // a bit of every lane whose `value` is not zero
};
void exchange(unsigned mask, Exchange& own);
void yield();

// Barriers in shared memory and the copies that end their phases. A copy is made when it is asked for or, in
// other orders of threads, when somebody looks whether it has been; its bytes must not be read before.
void make_barrier(void* barrier, unsigned arrivals);
void arrive(void* barrier, int announced_bytes);
bool has_ended(const void* barrier, unsigned parity);
void copy_in_bulk(void* to, const void* from, int bytes, void* barrier);
void copy_chunk(void* to, const void* from);
void arrive_with_chunks(void* barrier);
[[noreturn]] void fail(const char* message);

// Which fibers go first, and run as far as they can before others run at all: 0 those of low numbers, 1 those
// of high ones, others are seeds of random orders.
extern unsigned order;
// What the device is said to have.
extern int processors;
// Whether it has a unit that copies in bulk.
extern bool copies_in_bulk;
// How many bytes the latest launch has copied to shared memory.
extern int64_t copied_bytes;

}  // namespace cuda_on_host

// The built-in variables of a kernel.
extern cuda_on_host::Index threadIdx, blockIdx, blockDim, gridDim;
constexpr int warpSize = 32;
