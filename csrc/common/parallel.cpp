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
    // torch loads its runtime into the global symbol scope; libgomp's entry point is also exported by libomp.
    Parallel parallel = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    MaxThreads max_threads = reinterpret_cast<MaxThreads>(dlsym(RTLD_DEFAULT, "omp_get_max_threads"));
    bool usable() const { return parallel && max_threads; }
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

}  // namespace ttt
