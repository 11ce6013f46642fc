#include "cpu/thread_pool.h"

#include <pthread.h>
#include <signal.h>

#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>

#include "cpu/floating_point.h"
#include "cpu/openmp.h"

namespace peftk {

namespace {

// How long a worker spins for the next job before it sleeps: about 50 µs, which covers the gap between a job's two
// parallel loops and between one layer and the next.
constexpr int kSpins = 2000;

struct Job {
    void (*body)(void*, int64_t);
    void* context;
    int64_t tasks;
    int helpers;  // most workers that may join
};

// Hands out a job's tasks in ascending order to the threads that call `take`, and keeps the first exception.
class Tasks {
public:
    void start() { next_.store(0, std::memory_order_relaxed); }

    void take(const Job& job) {
        const DefaultFloatingPoint mode;
        try {
            for (int64_t task; (task = next_.fetch_add(1, std::memory_order_relaxed)) < job.tasks;) {
                job.body(job.context, task);
            }
        } catch (...) {
            // The caller rethrows the first failure. Tasks that have not started are skipped.
            next_.store(job.tasks, std::memory_order_relaxed);
            if (!failed_.exchange(true, std::memory_order_relaxed)) failure_ = std::current_exception();
        }
    }

    // Called by the caller of the job, when no thread takes tasks any more.
    void rethrow() {
        if (failed_.load(std::memory_order_relaxed)) {
            failed_.store(false, std::memory_order_relaxed);
            std::rethrow_exception(std::exchange(failure_, nullptr));
        }
    }

private:
    alignas(64) std::atomic<int64_t> next_{0};
    std::atomic<bool> failed_{false};
    std::exception_ptr failure_;  // written by the thread that set failed_
};

class Pool {
public:
    void run(const Job& job) {
        grow(job.helpers);
        job_ = job;
        tasks_.start();
        // Opens the job: its number is in the upper half, and no worker is inside yet.
        const uint64_t number = (state_.load(std::memory_order_relaxed) >> 32) + 1;
        state_.store(number << 32 | kOpen, std::memory_order_seq_cst);
        if (sleepers_.load(std::memory_order_seq_cst) > 0) {
            // a worker that has just read the state holds the mutex until it waits
            std::lock_guard<std::mutex> lock(mutex_);
            wake_.notify_all();
        }
        tasks_.take(job_);
        // Closes it: a worker that has not joined by now is not waited for.
        state_.fetch_and(~uint64_t(kOpen), std::memory_order_acq_rel);
        for (int spins = 0; state_.load(std::memory_order_acquire) & kInside; spins++) {
            spin_pause(spins);
        }
        tasks_.rethrow();
    }

    int workers() const { return workers_.load(std::memory_order_relaxed); }

private:
    static constexpr uint64_t kOpen = 1u << 31, kInside = kOpen - 1;

    void grow(int wanted) {
        int now = workers_.load(std::memory_order_relaxed);
        if (now >= wanted) return;
        sigset_t all, before;
        sigfillset(&all);
        // Workers inherit the mask, so signals go to the program's own threads.
        pthread_sigmask(SIG_SETMASK, &all, &before);
        try {
            for (; now < wanted; now++) std::thread(&Pool::work, this).detach();
        } catch (const std::exception&) {
            // No more threads, or no memory for them: the caller and the existing workers do the work.
        }
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
        workers_.store(now, std::memory_order_relaxed);
    }

    // Joins the open job unless it has enough helpers. job_ does not change while a worker is inside.
    bool join(uint64_t state) {
        while (state & kOpen) {
            if (state_.compare_exchange_weak(state, state + 1, std::memory_order_acq_rel)) {
                const bool wanted = int(state & kInside) < job_.helpers;
                if (wanted) tasks_.take(job_);
                state_.fetch_sub(1, std::memory_order_acq_rel);
                return wanted;
            }
        }
        return false;
    }

    void work() {
        uint64_t seen = 0;
        for (;;) {
            uint64_t state = wait_for_job(seen);
            seen = state >> 32;
            join(state);
        }
    }

    // Waits until the state has a job other than `seen`, and returns it.
    uint64_t wait_for_job(uint64_t seen) {
        for (int spin = 0; spin < kSpins; spin++) {
            const uint64_t state = state_.load(std::memory_order_acquire);
            if (state >> 32 != seen) return state;
            spin_pause(spin);
        }
        std::unique_lock<std::mutex> lock(mutex_);
        sleepers_.fetch_add(1, std::memory_order_seq_cst);
        uint64_t state;
        while ((state = state_.load(std::memory_order_seq_cst)) >> 32 == seen) wake_.wait(lock);
        sleepers_.fetch_sub(1, std::memory_order_relaxed);
        return state;
    }

    Job job_{};
    Tasks tasks_;
    alignas(64) std::atomic<uint64_t> state_{0};  // job number · 2^32, kOpen, workers inside
    std::atomic<int> workers_{0}, sleepers_{0};
    std::mutex mutex_;
    std::condition_variable wake_;
};

// Runs a job on torch's OpenMP threads. Between two of torch's operations these spin for milliseconds, and a second
// pool would have to share the cores with them.
void run_on_openmp(const Job& job, OpenMpParallel parallel) {
    struct Team {
        const Job& job;
        Tasks tasks;
    } team{job, {}};
    const auto take = [](void* context) {
        Team& its = *static_cast<Team*>(context);
        its.tasks.take(its.job);
    };
    parallel(take, &team, unsigned(job.helpers) + 1, 0);
    team.tasks.rethrow();
}

// Never destroyed: at exit its workers sleep or end with the process.
Pool* pool = nullptr;
std::mutex workers_mutex;  // held by the caller that has the workers
bool forked = false;

void lock_before_fork() { workers_mutex.lock(); }
void unlock_in_parent() { workers_mutex.unlock(); }
void reset_in_child() {
    pool = nullptr;  // its workers exist only in the parent
    forked = true;   // so do OpenMP's threads, and libgomp would wait for them forever
    workers_mutex.unlock();
}

// Registered at load time: a fork may come before our first job, but after torch's.
const int fork_handlers = pthread_atfork(lock_before_fork, unlock_in_parent, reset_in_child);

}  // namespace

void parallel_for(int64_t tasks, int threads, void (*body)(void*, int64_t), void* context) {
    if (tasks > 1 && threads > 1 && workers_mutex.try_lock()) {
        std::lock_guard<std::mutex> lock(workers_mutex, std::adopt_lock);
        if (borrows_openmp()) {
            // `threads`, even for fewer tasks: a team that changes its size with every job is slow to start
            run_on_openmp({body, context, tasks, threads - 1}, openmp_parallel());
            return;
        }
        if (!pool) pool = new Pool;
        pool->run({body, context, tasks, int(tasks < threads ? tasks : threads) - 1});
        return;
    }
    const DefaultFloatingPoint mode;
    for (int64_t task = 0; task < tasks; task++) body(context, task);
}

bool borrows_openmp() { return !forked && openmp_parallel() != nullptr; }

int pool_workers() {
    std::lock_guard<std::mutex> lock(workers_mutex);
    return pool ? pool->workers() : 0;
}

}  // namespace peftk
