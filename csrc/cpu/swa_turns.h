// Sums over the tasks of a group, in an order that does not depend on the number of threads.
#pragma once

#include <sched.h>

#include "cpu/swa_rows.h"

namespace ttt::TTT_ISA::swa {

// How far each chunk of a group has come in adding to the gradients of its keys. Tasks are handed out chunk
// after chunk, so that the one waited for is always being worked on or done.
class Turns {
  public:
    Turns(int64_t groups, int64_t chunks)
        : chunks_(chunks), scratch_(groups * chunks), next_(scratch_.take(0)) {
        fill<int64_t>(next_, groups * chunks, 0);
    }

    // Returns when the chunks before have added to all keys before `key`.
    void wait(int64_t group, int64_t chunk, int64_t key) const {
        if (chunk == 0) return;
        while (__atomic_load_n(next_ + group * chunks_ + chunk - 1, __ATOMIC_ACQUIRE) < key) sched_yield();
    }
    // Says that this chunk, and those before, will not add to keys before `key` any more.
    void done(int64_t group, int64_t chunk, int64_t key) {
        __atomic_store_n(next_ + group * chunks_ + chunk, key, __ATOMIC_RELEASE);
    }

  private:
    int64_t chunks_;
    Scratch<int64_t> scratch_;
    int64_t* next_;
};

// A sum over queries of rows for the keys from `start` on, (B, Tk - start, Hk, D) contiguous, in the type
// computed in. Without data: not wanted.
template <class C>
struct KeySum {
    C* data;
    int64_t start;

    explicit operator bool() const { return data != nullptr; }
    // Adds the rows of the keys `block` of a task's group to those of the keys `wanted`.
    void add(const Sizes& s, const Queries& queries, Range block, Range wanted, const C* rows) const {
        constexpr int L = lanes<C>;
        if (!data) return;
        for (int64_t key = wanted.begin; key < wanted.end; ++key) {
            C* to = data + ((queries.b * (s.Tk - start) + key - start) * s.Hk + queries.kv_head) * s.D;
            const C* from = rows + (key - block.begin) * row_stride<C>(s.D);
            int64_t d = 0;
            for (; d + L <= s.D; d += L) store(to + d, load(to + d) + load(from + d));
            for (; d < s.D; ++d) to[d] += from[d];
        }
    }
};

}  // namespace ttt::TTT_ISA::swa
