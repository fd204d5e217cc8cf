// Work sharing on the threads that torch already owns.
//
// The extension links no OpenMP runtime: a second one would spin against torch's between calls and halve
// the speed on few cores. parallel.cpp finds the runtime that torch has loaded and runs on its pool.
#pragma once

#include <cstdint>

namespace ttt {

// Threads that a parallel call may use: torch's own setting.
int max_threads();

// Calls fn(data, task, worker) for every task in [0, tasks), tasks handed out in order to whichever
// worker is free; worker is below max_threads() and no two tasks run at once with the same worker.
void run_tasks(int64_t tasks, void (*fn)(void*, int64_t, int), void* data);

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

}  // namespace ttt::TTT_ISA
#endif
