// Copies from global to shared memory that go on while a thread does something else.
#pragma once

#include <cuda_runtime.h>

#include "common/scalar.h"

namespace ttt::cuda {

// The copies of one thread. It may read what it has copied itself once it has waited for it; other threads
// may after a barrier that follows. On a processor a copy is made when it has to be there at the latest.
class AsyncCopies {
  public:
    // 16 bytes, both addresses being multiples of that.
    __device__ void copy(void* shared, const void* global) {
#ifdef __CUDA_ARCH__
        // Past the first cache, where nothing will be read again; neighbouring bytes are wanted soon.
        asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(
                         static_cast<unsigned>(__cvta_generic_to_shared(shared))),
                     "l"(global)
                     : "memory");
#elif !defined(__CUDACC__)
        if (waiting_ == kMost) cuda_on_host::fail("a thread has too many copies under way");
        copies_[waiting_++] = {static_cast<uint4*>(shared), static_cast<const uint4*>(global), groups_};
#endif
    }

    // Ends a group: the copies since the last one, or none.
    __device__ void end_group() {
#ifdef __CUDA_ARCH__
        asm volatile("cp.async.commit_group;" ::: "memory");
#elif !defined(__CUDACC__)
        ++groups_;
#endif
    }

    // Waits until only the latest kGroups groups may still be under way.
    template <int kGroups>
    __device__ void wait() {
#ifdef __CUDA_ARCH__
        asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
#elif !defined(__CUDACC__)
        int left = 0;
        for (int i = 0; i < waiting_; ++i) {
            const Copy& each = copies_[i];
            if (each.group + kGroups < groups_)
                *const_cast<uint4*>(cuda_on_host::aligned(each.to)) = *cuda_on_host::aligned(each.from);
            else
                copies_[left++] = each;
        }
        waiting_ = left;
#endif
    }

#ifndef __CUDACC__
  private:
    struct Copy {
        uint4* to;
        const uint4* from;
        int group;
    };
    static constexpr int kMost = 64;
    Copy copies_[kMost];
    int waiting_ = 0, groups_ = 0;
#endif
};

}  // namespace ttt::cuda
