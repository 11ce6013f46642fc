// One pool of threads for all kernels.
//
// parallel_for(tasks, threads, body, context) runs body(context, task) once for every task, on the caller and at most
// threads - 1 workers, and returns when all are done. Tasks are handed out dynamically, in ascending order, so kernels
// must compute the same bits on whichever thread a task runs. Bodies run in the default floating-point mode, because
// threads may have different modes (torch.set_flush_denormal changes only the calling thread's).
//
// Only one caller at a time has the workers. A second caller, on another thread, runs its tasks without workers: its
// own thread already keeps a core busy, and waiting would be slower. Bodies must not call parallel_for with more than
// one thread. If a body throws, tasks that have not started are skipped, and parallel_for throws the first exception
// when all running tasks have ended.
//
// There are two kinds of workers. torch's OpenMP threads, if torch has them: those spin between torch's operations, and
// threads of our own compete with that spinning for the cores. But they cannot be left behind: the caller waits for all
// of them, also for one that has no core. So where they came late, jobs run for a while on threads of our own, which
// are waited for only while they run a task (docs/cpu.md). Our own threads also serve where there is no OpenMP, and in
// a forked child, where libgomp's threads no longer exist and waiting for them would hang: the child starts without
// workers and creates them when it needs them.
#pragma once

#include <climits>
#include <cstdint>

namespace peftk {

void parallel_for(int64_t tasks, int threads, void (*body)(void* context, int64_t task), void* context);

// The same for a callable object. The function has internal linkage in the caller's translation unit.
template <class Body>
static inline void parallel_for(int64_t tasks, int threads, Body& body) {
    parallel_for(tasks, threads, [](void* context, int64_t task) { (*static_cast<Body*>(context))(task); }, &body);
}

// Where threads wait for a change that another thread makes. They spin for a moment, then sleep.
class Bell {
public:
    template <class Changed>
    void wait_until(Changed changed);  // defined for thread_pool.cpp alone
    void ring(int most = INT_MAX);     // after the change; wakes so many sleepers at most

private:
    uint32_t rung_ = 0, sleepers_ = 0;
};

// Lets tasks of a job wait for `tasks` other tasks with lower numbers. This costs far less than a second job. It cannot
// hang: tasks are handed out in ascending order, so all those tasks have been taken by running threads. A task that
// throws counts as ended.
class Latch {
public:
    explicit Latch(int64_t tasks) : tasks_(tasks) {}

    // Counts one of the tasks as ended when this object is destroyed.
    class CountOnExit {
    public:
        explicit CountOnExit(Latch& latch) : latch_(latch) {}
        ~CountOnExit() { latch_.end_one(); }
        CountOnExit(const CountOnExit&) = delete;

    private:
        Latch& latch_;
    };

    void wait() const;

private:
    void end_one();

    const int64_t tasks_;
    int64_t ended_ = 0;
    mutable Bell bell_;
};

int pool_workers();     // number of our own workers that this process has
bool borrows_openmp();  // whether jobs run on torch's OpenMP threads unless those came late

}  // namespace peftk
