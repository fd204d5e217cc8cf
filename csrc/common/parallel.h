// Work sharing on the threads that torch already owns.
//
// The extension links no OpenMP runtime: a second one would spin against torch's between calls and halve
// the speed on few cores. parallel.cpp finds the runtime that torch has loaded and runs on its pool.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>

namespace ttt {

// Threads that a parallel call may use: torch's own setting.
int max_threads();

// Calls fn(data, task, worker) for every task in [0, tasks), tasks handed out in order to whichever
// worker is free; worker is below max_threads() and no two tasks run at once with the same worker.
void run_tasks(int64_t tasks, void (*fn)(void*, int64_t, int), void* data);

// The workers of one parallel region, for work of many short stages: to end a stage with wait() costs a
// fraction of leaving the region and entering another.
class Team {
  public:
    explicit Team(int most_workers) : next_(new Counter[static_cast<size_t>(most_workers)]) {}
    // To be called by each worker once, before anything else, with how many there are: returns its number.
    int enter(int workers);
    int workers() const { return workers_.load(std::memory_order_relaxed); }
    // The next task of a worker's share in this stage, counting from 0.
    int64_t claim(int owner) { return next_[owner].value.fetch_add(1, std::memory_order_relaxed); }
    // Returns when every worker has called it; what they wrote before is then visible to all.
    void wait();

  private:
    // On lines of their own: one worker's claims and another's waiting do not slow each other down.
    struct alignas(64) Counter {
        std::atomic<int64_t> value{0};
    };

    const std::unique_ptr<Counter[]> next_;
    std::atomic<int> workers_{0};
    std::atomic<int> entered_{0};
    alignas(64) std::atomic<int> waiting_{0};
    alignas(64) std::atomic<unsigned> generation_{0};
};

// Calls fn(data, team, worker) once on each worker of a team: max_threads(), or fewer where the runtime gives
// fewer.
void run_team(void (*fn)(void*, Team&, int), void* data);

}  // namespace ttt

#ifdef TTT_ISA
namespace ttt::TTT_ISA {

template <class F>
void parallel_tasks(int64_t tasks, F&& f) {
    run_tasks(
        tasks, [](void* data, int64_t task, int worker) { (*static_cast<F*>(data))(task, worker); }, &f);
}

// Calls f(begin, end) over disjoint ranges that cover [0, n), each of at least `grain` items but the last.
template <class F>
void parallel_for(int64_t n, int64_t grain, F&& f) {
    if (n <= 0) return;
    if (grain < 1) grain = 1;
    int64_t chunks = (n + grain - 1) / grain;
    const int64_t most = 4 * static_cast<int64_t>(max_threads());
    if (chunks > most) chunks = most;
    if (max_threads() == 1) chunks = 1;
    parallel_tasks(chunks, [&](int64_t task, int) { f(task * n / chunks, (task + 1) * n / chunks); });
}

// Calls f(team, worker) once on each worker of a team.
template <class F>
void parallel_region(F&& f) {
    run_team([](void* data, Team& team, int worker) { (*static_cast<F*>(data))(team, worker); }, &f);
}

// One stage, to which all workers must come: calls f(owner, task) for every task in [0, tasks(owner)) of
// every owner, each on one worker. A worker does its own tasks first, in order, then what is left of the
// others'.
template <class Tasks, class F>
void share_stage(Team& team, int worker, Tasks&& tasks, F&& f) {
    for (int i = 0; i < team.workers(); ++i) {
        const int owner = (worker + i) % team.workers();
        const int64_t end = tasks(owner);
        for (int64_t task; (task = team.claim(owner)) < end;) f(owner, task);
    }
    team.wait();
}

}  // namespace ttt::TTT_ISA
#endif
