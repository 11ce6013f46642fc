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
// The workers are torch's OpenMP threads if torch has them: those spin between torch's operations, and a pool of our
// own would compete with that spinning for the cores (docs/cpu.md). Otherwise the workers are our own threads. So they
// are in a forked child, where libgomp's threads no longer exist and waiting for them would hang: the child starts
// without workers and creates them when it needs them.
#pragma once

#include <sched.h>

#include <cstdint>

namespace peftk {

void parallel_for(int64_t tasks, int threads, void (*body)(void* context, int64_t task), void* context);

// The same for a callable object. The function has internal linkage in the caller's translation unit.
template <class Body>
static inline void parallel_for(int64_t tasks, int threads, Body& body) {
    parallel_for(tasks, threads, [](void* context, int64_t task) { (*static_cast<Body*>(context))(task); }, &body);
}

// A turn of a spinning loop: yields to the core's other hardware thread, and after many turns to the scheduler.
static inline void spin_pause(int64_t turn) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
    if (turn > 2000) sched_yield();
}

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
        ~CountOnExit() { __atomic_fetch_add(&latch_.ended_, 1, __ATOMIC_RELEASE); }
        CountOnExit(const CountOnExit&) = delete;

    private:
        Latch& latch_;
    };

    void wait() const {
        for (int64_t turn = 0; __atomic_load_n(&ended_, __ATOMIC_ACQUIRE) < tasks_; turn++) spin_pause(turn);
    }

private:
    const int64_t tasks_;
    int64_t ended_ = 0;
};

int pool_workers();     // number of our own workers that this process has
bool borrows_openmp();  // whether jobs run on torch's OpenMP threads instead of our own

}  // namespace peftk
