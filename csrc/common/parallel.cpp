#include "common/parallel.h"

#include <dlfcn.h>

#include <atomic>
#include <thread>
#include <vector>

namespace ttt {
namespace {

struct OpenMP {
    using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
    using MaxThreads = int (*)();
    using TeamSize = int (*)();
    // torch loads its runtime into the global symbol scope; libgomp's entry point is also exported by libomp.
    Parallel parallel = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    MaxThreads max_threads = reinterpret_cast<MaxThreads>(dlsym(RTLD_DEFAULT, "omp_get_max_threads"));
    TeamSize team_size = reinterpret_cast<TeamSize>(dlsym(RTLD_DEFAULT, "omp_get_num_threads"));
    bool usable() const { return parallel && max_threads && team_size; }
};

const OpenMP& openmp() {
    static const OpenMP runtime;
    return runtime;
}

struct Job {
    void (*fn)(void*, int64_t, int);
    void* data;
    int64_t tasks;
    std::atomic<int64_t> next{0};
    std::atomic<int> workers{0};

    void work() {
        const int worker = workers.fetch_add(1);
        for (int64_t task; (task = next.fetch_add(1)) < tasks;) fn(data, task, worker);
    }
};

// How often a waiting worker looks before it lets others run: for some tens of microseconds, longer than
// workers that run take. One that is still missed then may be waiting for this one's processor.
constexpr int kLooks = 1000;

void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}

}  // namespace

int max_threads() {
    if (openmp().usable()) return openmp().max_threads();
    const unsigned n = std::thread::hardware_concurrency();
    return n ? static_cast<int>(n) : 1;
}

void run_tasks(int64_t tasks, void (*fn)(void*, int64_t, int), void* data) {
    int64_t threads = max_threads();
    if (tasks < threads) threads = tasks;
    Job job{fn, data, tasks};
    if (threads <= 1) {
        job.work();
        return;
    }
    auto body = [](void* j) { static_cast<Job*>(j)->work(); };
    if (openmp().usable()) {
        openmp().parallel(body, &job, static_cast<unsigned>(threads), 0);
        return;
    }
    std::vector<std::thread> pool;
    for (int64_t i = 1; i < threads; ++i) pool.emplace_back(body, &job);
    body(&job);
    for (auto& thread : pool) thread.join();
}

int Team::enter(int workers) {
    workers_.store(workers, std::memory_order_relaxed);
    return entered_.fetch_add(1, std::memory_order_relaxed);
}

void Team::wait() {
    const unsigned generation = generation_.load(std::memory_order_acquire);
    if (waiting_.fetch_add(1, std::memory_order_acq_rel) + 1 == workers()) {
        for (int owner = 0; owner < workers(); ++owner)
            next_[owner].value.store(0, std::memory_order_relaxed);
        waiting_.store(0, std::memory_order_relaxed);
        generation_.store(generation + 1, std::memory_order_release);
        return;
    }
    for (int looks = 0; generation_.load(std::memory_order_acquire) == generation; ++looks) {
        if (looks < kLooks)
            pause();
        else
            std::this_thread::yield();
    }
}

void run_team(void (*fn)(void*, Team&, int), void* data) {
    struct Region {
        void (*fn)(void*, Team&, int);
        void* data;
        int threads;
        Team team;

        void work(int workers) { fn(data, team, team.enter(workers)); }
    } region{fn, data, max_threads(), Team(max_threads())};
    if (region.threads <= 1) {
        region.work(1);
    } else if (openmp().usable()) {
        // The runtime may give fewer threads than asked for, and says how many only inside.
        auto body = [](void* r) { static_cast<Region*>(r)->work(openmp().team_size()); };
        openmp().parallel(body, &region, static_cast<unsigned>(region.threads), 0);
    } else {
        std::vector<std::thread> pool;
        for (int i = 1; i < region.threads; ++i) pool.emplace_back([&] { region.work(region.threads); });
        region.work(region.threads);
        for (auto& thread : pool) thread.join();
    }
}

}  // namespace ttt
