// One pool of threads for all kernels.
//
// parallel_for(tasks, threads, body, context) runs body(context, task) for every task once, on the caller and at most
// threads - 1 workers, and returns when all are done. Tasks are handed out in ascending order, dynamically: kernels
// must compute the same bits whichever thread takes a task. Bodies run in the default floating-point mode, because
// threads may differ in theirs (torch.set_flush_denormal changes only the calling one).
//
// Only one caller at a time has the workers. A second one, from another thread, runs its tasks by itself meanwhile: its
// thread is a core's worth of work already, and waiting would be slower. Bodies must not call parallel_for with more
// than one thread. Where a body throws, tasks that nobody has begun are left out, and parallel_for throws the first
// exception once all others have ended.
//
// The workers are torch's own OpenMP threads where torch has them: they spin between torch's operations, and a pool of
// ours would have to share the cores with that spinning (docs/cpu.md). Everywhere else, and in a forked child, where
// libgomp's threads are gone and waiting for them would hang, they are threads of ours: the child starts without
// workers and makes its own when it needs them.
#pragma once

#include <sched.h>

#include <cstdint>

namespace peftk {

void parallel_for(int64_t tasks, int threads, void (*body)(void* context, int64_t task), void* context);

// The same for a callable object, always as a function of internal linkage in the caller's translation unit.
template <class Body>
static inline void parallel_for(int64_t tasks, int threads, Body& body) {
    parallel_for(tasks, threads, [](void* context, int64_t task) { (*static_cast<Body*>(context))(task); }, &body);
}

// Lets a core's other thread run, and after a while another thread on this core.
static inline void wait_a_little(int64_t turn) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
    if (turn > 2000) sched_yield();
}

// Where tasks of a job wait for `tasks` other ones, which have lower numbers. Starting a job costs far more than this.
// It can't hang: tasks are handed out in ascending order, so whoever waits knows that all those tasks are in the hands
// of threads that run; one that throws counts as ended.
class Meeting {
public:
    explicit Meeting(int64_t tasks) : tasks_(tasks) {}

    // One of the tasks, as long as this object lives.
    class Part {
    public:
        explicit Part(Meeting& meeting) : meeting_(meeting) {}
        ~Part() { __atomic_fetch_add(&meeting_.ended_, 1, __ATOMIC_RELEASE); }
        Part(const Part&) = delete;

    private:
        Meeting& meeting_;
    };

    void wait() const {
        for (int64_t turn = 0; __atomic_load_n(&ended_, __ATOMIC_ACQUIRE) < tasks_; turn++) wait_a_little(turn);
    }

private:
    const int64_t tasks_;
    int64_t ended_ = 0;
};

int pool_workers();     // how many workers of our own this process has now
bool borrows_openmp();  // whether jobs run on torch's OpenMP threads instead

}  // namespace peftk
