#include "fibers.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

cuda_on_host::Index threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_host {

unsigned order = 0;
int processors = 3;
bool copies_in_bulk = true;
int64_t copied_bytes = 0;

namespace {

constexpr size_t kStack = 256 * 1024;
constexpr size_t kCanary = 64;  // bytes behind the shared memory of a block, which no thread may write
constexpr unsigned char kPoison = 0xff;
// A thread that only looks while nobody else does anything will do so for ever. A warp's exchanges are
// nothing: whole warps look, and tell each other what they have seen.
constexpr int kPatience = 1000;

struct Block;

struct Copy {
    void* to;
    const void* from;
    size_t bytes;
};

// What an mbarrier is; where it is in shared memory there is nothing.
struct PhaseBarrier {
    unsigned arrivals, missing;
    int64_t bytes = 0;
    unsigned parity = 0;
    std::vector<Copy> copies;
    unsigned arrives_with_copies = 0;
};

struct Fiber {
    Block* block;
    unsigned linear;
    Index index;
    unsigned char* stack;
    jmp_buf place;
    bool started = false, ended = false;
    size_t rank = 0;  // those that come first in the order run until they have to wait
    Exchange* exchange = nullptr;
    std::vector<Copy> chunks;
};

// Lanes of a warp that have come to an exchange, by the mask they gave.
struct Warp {
    std::map<unsigned, unsigned> arrived;
};

struct Barrier {
    std::vector<Fiber*> waiting;
    unsigned threads = 0;
};

struct Block {
    Index index;
    std::vector<unsigned char> shared;
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    Barrier barriers[16];
    unsigned alive = 0;
};

unsigned volume(const Index& size) {
    return size.x * size.y * size.z;
}
Index at(unsigned linear, const Index& size) {
    return {linear % size.x, linear / size.x % size.y, linear / size.x / size.y};
}

// Stacks are kept between launches; a page between two of them ends the program where one overflows.
unsigned char* stack(size_t i) {
    static std::vector<unsigned char*> all;
    static const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    while (all.size() <= i) {
        void* memory = mmap(nullptr, kStack + page, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) throw std::runtime_error("no memory for the stack of another thread");
        mprotect(memory, page, PROT_NONE);
        all.push_back(static_cast<unsigned char*>(memory) + page);
    }
    return all[i];
}

class Scheduler {
  public:
    Scheduler(const Launch& launch, const std::function<void()>& body)
        : launch_(launch), body_(body), random_(order) {}

    void run() {
        const unsigned blocks = volume(launch_.grid);
        std::vector<unsigned> sequence(blocks);
        for (unsigned i = 0; i < blocks; ++i) sequence[i] = i;
        arrange(sequence);
        const unsigned at_once = std::max(1u, std::min(blocks, launch_.blocks_at_once));
        for (unsigned i = 0; i < blocks; i += at_once) {
            for (unsigned k = i; k < std::min(blocks, i + at_once); ++k) create(sequence[k]);
            run_blocks();
            blocks_.clear();
            phase_barriers_.clear();
        }
    }

    void wait_for_block(int number, unsigned threads) {
        if (number < 0 || number > 15) fail("a block has barriers 0 to 15");
        Barrier& barrier = current_->block->barriers[number];
        if (!barrier.waiting.empty() && barrier.threads != threads)
            fail("threads come to a barrier with different numbers of threads");
        barrier.threads = threads;
        barrier.waiting.push_back(current_);
        if (!release(*current_->block, barrier)) {
            ready_.erase(current_->rank);
            switch_out();
        }
    }

    void exchange(unsigned mask, Exchange& own) {
        const unsigned own_bit = 1u << current_->linear % 32;
        if (!(mask & own_bit)) fail("a lane calls for lanes without itself");
        Block& block = *current_->block;
        const unsigned first = current_->linear / 32 * 32;
        for (unsigned lane = 0; lane < 32; ++lane)
            if (mask >> lane & 1 && (first + lane >= block.fibers.size() || block.fibers[first + lane].ended))
                fail("a lane waits for one that does not exist or has ended");
        if (!(mask >> own.source & 1)) fail("a lane takes the value of one that gives none");
        current_->exchange = &own;
        Warp& warp = block.warps[first / 32];
        unsigned& arrived = warp.arrived[mask];
        arrived |= own_bit;
        if (arrived != mask) {
            ready_.erase(current_->rank);
            switch_out();
            return;
        }
        warp.arrived.erase(mask);
        unsigned votes = 0;
        const auto lane_of = [&](unsigned lane) -> Fiber& { return block.fibers[first + lane]; };
        for (unsigned lane = 0; lane < 32; ++lane)
            if (mask >> lane & 1 && lane_of(lane).exchange->value) votes |= 1u << lane;
        for (unsigned lane = 0; lane < 32; ++lane) {
            if (!(mask >> lane & 1)) continue;
            Exchange& taker = *lane_of(lane).exchange;
            taker.received = lane_of(taker.source).exchange->value;
            taker.votes = votes;
            ready_.insert(lane_of(lane).rank);
        }
    }

    void yield() {
        ready_.erase(current_->rank);
        looking_.push_back(current_);
        switch_out();
    }

    Fiber* current() const { return current_; }

    void make_barrier(void* at, unsigned arrivals) {
        check_in_shared(at, 8, 8);
        phase_barriers_[at] = {arrivals, arrivals};
    }
    void arrive(void* at, int announced) {
        PhaseBarrier& barrier = phase_barrier(at);
        if (!barrier.missing) fail("more threads arrive at a barrier than it was made for");
        barrier.bytes += announced;
        --barrier.missing;
        end_phase(barrier);
    }
    bool has_ended(const void* at, unsigned parity) {
        PhaseBarrier& barrier = phase_barrier(at);
        make_copies(barrier);
        return barrier.parity != parity;
    }
    void copy_in_bulk(void* to, const void* from, int bytes, void* at) {
        check_copy(to, from, static_cast<size_t>(bytes));
        if (bytes % 16) fail("a copy's size is no multiple of 16 bytes");
        PhaseBarrier& barrier = phase_barrier(at);
        barrier.copies.push_back({to, from, static_cast<size_t>(bytes)});
        if (order == 1) make_copies(barrier);
    }
    void copy_chunk(void* to, const void* from) {
        check_copy(to, from, 16);
        current_->chunks.push_back({to, from, 16});
    }
    void arrive_with_chunks(void* at) {
        PhaseBarrier& barrier = phase_barrier(at);
        auto& chunks = current_->chunks;
        barrier.copies.insert(barrier.copies.end(), chunks.begin(), chunks.end());
        for (const Copy& copy : chunks) barrier.bytes += static_cast<int64_t>(copy.bytes);
        chunks.clear();
        ++barrier.arrives_with_copies;
        if (order == 1) make_copies(barrier);
    }

  private:
    void check_in_shared(const void* at, size_t bytes, size_t multiple) const {
        const auto* from = memory(*current_->block);
        const auto* to = static_cast<const unsigned char*>(at);
        if (to < from || to + bytes > from + launch_.shared) fail("what should be in shared memory is not");
        if (reinterpret_cast<uintptr_t>(at) % multiple) fail("a vector is not where its size demands");
    }
    void check_copy(const void* to, const void* from, size_t bytes) const {
        check_in_shared(to, bytes, 16);
        if (reinterpret_cast<uintptr_t>(from) % 16) fail("a vector is not where its size demands");
    }
    PhaseBarrier& phase_barrier(const void* at) {
        const auto found = phase_barriers_.find(at);
        if (found == phase_barriers_.end()) fail("a barrier is used that nobody has made");
        return found->second;
    }
    void make_copies(PhaseBarrier& barrier) {
        for (const Copy& copy : barrier.copies) {
            std::memcpy(copy.to, copy.from, copy.bytes);
            barrier.bytes -= static_cast<int64_t>(copy.bytes);
            copied_bytes += static_cast<int64_t>(copy.bytes);
        }
        barrier.copies.clear();
        if (barrier.arrives_with_copies > barrier.missing)
            fail("more threads arrive at a barrier than it was made for");
        barrier.missing -= barrier.arrives_with_copies;
        barrier.arrives_with_copies = 0;
        end_phase(barrier);
    }
    void end_phase(PhaseBarrier& barrier) {
        if (barrier.missing || barrier.bytes) return;
        barrier.missing = barrier.arrivals;
        barrier.parity ^= 1;
        happened_ = true;
        // Who looks for it may see it before others of this thread's warp have come as far.
        for (Fiber* fiber : looking_) ready_.insert(fiber->rank);
        looking_.clear();
    }

    template <class T>
    void arrange(std::vector<T>& items) {
        if (order == 1) std::reverse(items.begin(), items.end());
        if (order > 1) std::shuffle(items.begin(), items.end(), random_);
    }

    void create(unsigned linear) {
        const unsigned threads = volume(launch_.block);
        blocks_.push_back(std::make_unique<Block>());
        Block& block = *blocks_.back();
        block.index = at(linear, launch_.grid);
        // As its address on the device, a multiple of 128 bytes.
        block.shared.assign(launch_.shared + kCanary + 128, kPoison);
        block.fibers.resize(threads);
        block.warps.resize((threads + 31) / 32);
        block.alive = threads;
        for (unsigned i = 0; i < threads; ++i) {
            Fiber& fiber = block.fibers[i];
            fiber.block = &block;
            fiber.linear = i;
            fiber.index = at(i, launch_.block);
            fiber.stack = stack((blocks_.size() - 1) * threads + i);
        }
    }

    // Those of a warp stay together in a random order, so that a whole warp falls behind the others.
    void rank() {
        by_rank_.clear();
        std::vector<std::vector<Fiber*>> warps;
        for (const auto& block : blocks_) {
            for (Fiber& fiber : block->fibers) {
                if (fiber.linear % 32 == 0) warps.emplace_back();
                warps.back().push_back(&fiber);
            }
        }
        arrange(warps);
        for (auto& warp : warps) {
            arrange(warp);
            by_rank_.insert(by_rank_.end(), warp.begin(), warp.end());
        }
        for (size_t i = 0; i < by_rank_.size(); ++i) {
            by_rank_[i]->rank = i;
            ready_.insert(i);
        }
    }

    void run_blocks() {
        rank();
        int idle = 0;
        while (!ready_.empty() || !looking_.empty()) {
            if (ready_.empty()) {
                idle = happened_ ? 0 : idle + 1;
                if (idle > kPatience) fail("threads look for what no other thread will write");
                happened_ = false;
                for (Fiber* fiber : looking_) ready_.insert(fiber->rank);
                looking_.clear();
            }
            resume(*by_rank_[*ready_.begin()]);
            if (failure_) std::rethrow_exception(failure_);
        }
        for (const auto& [at, barrier] : phase_barriers_)
            if (!barrier.copies.empty()) fail("threads have ended without having waited for a copy");
        for (const auto& block : blocks_) {
            if (block->alive) fail("all threads wait for others");
            for (const Fiber& fiber : block->fibers)
                if (!fiber.chunks.empty()) fail("a thread has ended with copies that nobody waits for");
            for (size_t i = 0; i < kCanary; ++i)
                if (memory(*block)[launch_.shared + i] != kPoison)
                    fail("a thread has written beyond the block's dynamic shared memory");
        }
    }

    // Lets the threads at a barrier go on when as many have come as it is for; whether they have.
    bool release(Block& block, Barrier& barrier) {
        const unsigned wanted = barrier.threads ? barrier.threads : block.alive;
        if (barrier.waiting.empty() || barrier.waiting.size() < wanted) return false;
        for (Fiber* fiber : barrier.waiting) ready_.insert(fiber->rank);
        barrier.waiting.clear();
        happened_ = true;
        return true;
    }

    void resume(Fiber& fiber) {
        current_ = &fiber;
        threadIdx = fiber.index;
        blockIdx = fiber.block->index;
        if (_setjmp(home_)) return;
        if (fiber.started) _longjmp(fiber.place, 1);
        fiber.started = true;
        ucontext_t context;
        getcontext(&context);
        context.uc_stack.ss_sp = fiber.stack;
        context.uc_stack.ss_size = kStack;
        context.uc_link = nullptr;
        makecontext(&context, &Scheduler::enter, 0);
        setcontext(&context);
    }

    void switch_out() {
        if (!_setjmp(current_->place)) _longjmp(home_, 1);
    }

    static void enter();

    void thread() {
        try {
            body_();
        } catch (...) {
            failure_ = std::current_exception();
        }
        current_->ended = true;
        ready_.erase(current_->rank);
        happened_ = true;
        --current_->block->alive;
        for (Barrier& barrier : current_->block->barriers)
            if (!barrier.threads) release(*current_->block, barrier);
        _longjmp(home_, 1);
    }

  public:
    static unsigned char* memory(Block& block) {
        const auto address = reinterpret_cast<uintptr_t>(block.shared.data());
        return block.shared.data() + (128 - address % 128) % 128;
    }
    [[noreturn]] void fail(const char* message) const {
        throw std::runtime_error(std::string("a CUDA kernel on the host: ") + message);
    }

  private:
    const Launch launch_;
    const std::function<void()>& body_;
    std::mt19937 random_;
    std::vector<std::unique_ptr<Block>> blocks_;
    std::map<const void*, PhaseBarrier> phase_barriers_;
    std::vector<Fiber*> by_rank_;
    std::set<size_t> ready_;       // ranks
    std::vector<Fiber*> looking_;  // they run again when all others wait
    Fiber* current_ = nullptr;
    jmp_buf home_;
    bool happened_ = false;
    std::exception_ptr failure_;
};

Scheduler* scheduler = nullptr;
std::mutex one_launch_at_a_time;

void Scheduler::enter() {
    scheduler->thread();
}

}  // namespace

void run(const Launch& launch, const std::function<void()>& body) {
    const std::lock_guard<std::mutex> lock(one_launch_at_a_time);
    Scheduler own(launch, body);
    scheduler = &own;
    copied_bytes = 0;
    blockDim = launch.block;
    gridDim = launch.grid;
    own.run();
}

unsigned char* dynamic_shared() {
    return Scheduler::memory(*scheduler->current()->block);
}
void wait_for_block(int barrier, unsigned threads) {
    scheduler->wait_for_block(barrier, threads);
}
unsigned lane() {
    return scheduler->current()->linear % 32;
}
void exchange(unsigned mask, Exchange& own) {
    scheduler->exchange(mask, own);
}
void yield() {
    scheduler->yield();
}
void make_barrier(void* barrier, unsigned arrivals) {
    scheduler->make_barrier(barrier, arrivals);
}
void arrive(void* barrier, int announced_bytes) {
    scheduler->arrive(barrier, announced_bytes);
}
bool has_ended(const void* barrier, unsigned parity) {
    return scheduler->has_ended(barrier, parity);
}
void copy_in_bulk(void* to, const void* from, int bytes, void* barrier) {
    scheduler->copy_in_bulk(to, from, bytes, barrier);
}
void copy_chunk(void* to, const void* from) {
    scheduler->copy_chunk(to, from);
}
void arrive_with_chunks(void* barrier) {
    scheduler->arrive_with_chunks(barrier);
}
void fail(const char* message) {
    scheduler->fail(message);
}

}  // namespace cuda_on_host
