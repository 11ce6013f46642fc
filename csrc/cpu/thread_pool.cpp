#include "cpu/thread_pool.h"

#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <climits>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>

#include "cpu/floating_point.h"
#include "cpu/lateness.h"
#include "cpu/openmp.h"

namespace peftk {

namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::microseconds;

// How long a thread spins before it sleeps: about 50 µs on a Zen 3, since a pause takes longer on some processors than
// on others. This covers the gap between two parallel loops, between one layer and the next, and the rest of a task on
// another thread. A thread that has lost its core takes milliseconds.
constexpr int kSpins = 2000;

// Where OpenMP's threads came late, the caller works alone for this long before it wakes workers. So small jobs stay on
// their thread.
constexpr microseconds kAlone(400);

// Our workers ask the scheduler for short slices, because then they soon get a core that a busy thread has (Linux 6.12
// and later; without effect before). It does not change their share of time.
constexpr uint64_t kSlice = 100'000;  // ns, the least that Linux allows

void ask_for_short_slices() {
#if defined(SYS_sched_setattr) && defined(SYS_sched_getattr)
    struct {  // sched_attr of linux/sched/types.h, which glibc's headers contradict
        uint32_t size, policy;
        uint64_t flags;
        int32_t nice;
        uint32_t priority;
        uint64_t runtime, deadline, period;
    } attributes{};
    attributes.size = sizeof attributes;
    if (syscall(SYS_sched_getattr, 0, &attributes, sizeof attributes, 0) != 0 || attributes.policy != SCHED_OTHER) {
        return;
    }
    attributes.runtime = kSlice;
    syscall(SYS_sched_setattr, 0, &attributes, 0);
#endif
}

// What this thread has had of a processor.
Clock::duration processor_time() {
    timespec time{};
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
    return std::chrono::duration_cast<Clock::duration>(std::chrono::seconds(time.tv_sec) +
                                                       std::chrono::nanoseconds(time.tv_nsec));
}

// How long this thread has slept while it waited for others.
thread_local Clock::duration slept{0};

// A turn of a spinning loop: yields to the core's other hardware thread.
void spin_pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

}  // namespace

// Whoever rings has made the change before. A thread that goes to sleep counts itself before it looks for the change,
// so either it sees the change, or the other thread sees that it sleeps; all of these accesses are sequentially
// consistent.
template <class Changed>
void Bell::wait_until(Changed changed) {
    for (int spin = 0; spin < kSpins; spin++) {
        if (changed()) return;
        spin_pause();
    }
    const Clock::time_point begin = Clock::now();
    __atomic_fetch_add(&sleepers_, 1, __ATOMIC_SEQ_CST);
    for (;;) {
        const uint32_t rung = __atomic_load_n(&rung_, __ATOMIC_SEQ_CST);
        if (changed()) break;
        // returns at once if the bell has been rung since
        syscall(SYS_futex, &rung_, FUTEX_WAIT_PRIVATE, rung, nullptr, nullptr, 0);
    }
    __atomic_fetch_sub(&sleepers_, 1, __ATOMIC_SEQ_CST);
    slept += Clock::now() - begin;
}

void Bell::ring(int most) {
    __atomic_fetch_add(&rung_, 1, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&sleepers_, __ATOMIC_SEQ_CST) == 0) return;
    syscall(SYS_futex, &rung_, FUTEX_WAKE_PRIVATE, most, nullptr, nullptr, 0);
}

void Latch::wait() const {
    bell_.wait_until([this] { return __atomic_load_n(&ended_, __ATOMIC_SEQ_CST) >= tasks_; });
}

void Latch::end_one() {
    if (__atomic_add_fetch(&ended_, 1, __ATOMIC_SEQ_CST) == tasks_) bell_.ring();
}

namespace {

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

    // Runs tasks until none is left, or until a task ends after `until`. Returns whether some may be left.
    bool take(const Job& job, Clock::time_point until = Clock::time_point::max()) {
        const DefaultFloatingPoint mode;
        try {
            for (int64_t task; (task = next_.fetch_add(1, std::memory_order_relaxed)) < job.tasks;) {
                job.body(job.context, task);
                if (until != Clock::time_point::max() && Clock::now() > until) {
                    return next_.load(std::memory_order_relaxed) < job.tasks;
                }
            }
        } catch (...) {
            // The caller rethrows the first failure. Tasks that have not started are skipped.
            next_.store(job.tasks, std::memory_order_relaxed);
            if (!failed_.exchange(true, std::memory_order_relaxed)) failure_ = std::current_exception();
        }
        return false;
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
    // alone: how long the caller works before it lets workers join.
    void run(const Job& job, microseconds alone) {
        tasks_.start();
        if (alone.count() == 0 || tasks_.take(job, Clock::now() + alone)) share(job);
        tasks_.rethrow();
    }

    int workers() const { return workers_.load(std::memory_order_relaxed); }

private:
    static constexpr uint64_t kOpen = 1u << 31, kInside = kOpen - 1;

    void share(const Job& job) {
        grow(job.helpers);
        job_ = job;
        // Opens the job: its number is in the upper half, and no worker is inside yet.
        const uint64_t number = (state_.load(std::memory_order_relaxed) >> 32) + 1;
        state_.store(number << 32 | kOpen, std::memory_order_seq_cst);
        opened_.ring(job.helpers);
        tasks_.take(job_);
        // Closes it: a worker that has not joined by now is not waited for.
        state_.fetch_and(~uint64_t(kOpen), std::memory_order_acq_rel);
        left_.wait_until([this] { return (state_.load(std::memory_order_seq_cst) & kInside) == 0; });
    }

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
                state_.fetch_sub(1, std::memory_order_seq_cst);
                left_.ring();
                return wanted;
            }
        }
        return false;
    }

    void work() {
        ask_for_short_slices();
        for (uint64_t state = 0;;) {
            const uint64_t seen = state >> 32;
            opened_.wait_until([&] { return (state = state_.load(std::memory_order_seq_cst)) >> 32 != seen; });
            join(state);
        }
    }

    Job job_{};
    Tasks tasks_;
    alignas(64) std::atomic<uint64_t> state_{0};  // job number · 2^32, kOpen, workers inside
    std::atomic<int> workers_{0};
    Bell opened_, left_;  // rung when a job is opened, and when a worker leaves it
};

// Runs a job on torch's OpenMP threads and looks whether they came late.
void borrow(const Job& job, OpenMpParallel parallel, Lateness& lateness) {
    struct Team {
        const Job& job;
        Tasks tasks;
        pthread_t caller;
        Clock::duration worked;               // by the caller
        std::atomic<Clock::rep> most_worked;  // by another thread
    } team{job, {}, pthread_self(), {}, {0}};
    const auto take = [](void* context) {
        Team& its = *static_cast<Team*>(context);
        if (!pthread_equal(its.caller, pthread_self())) {
            const Clock::duration before = processor_time();
            its.tasks.take(its.job);
            const Clock::rep worked = (processor_time() - before).count();
            Clock::rep most = its.most_worked.load(std::memory_order_relaxed);
            while (worked > most && !its.most_worked.compare_exchange_weak(most, worked)) {
            }
            return;
        }
        slept = Clock::duration::zero();
        const Clock::time_point begin = Clock::now();
        its.tasks.take(its.job);
        its.worked = Clock::now() - begin - slept;
    };
    const Clock::time_point begin = Clock::now();
    parallel(take, &team, unsigned(job.helpers) + 1, 0);
    lateness.look_back(Clock::now() - begin, team.worked, Clock::duration(team.most_worked.load()));
    team.tasks.rethrow();
}

// Never destroyed: at exit its workers sleep or end with the process.
Pool* pool = nullptr;
Lateness lateness;         // of torch's OpenMP threads; its times are those of jobs
std::mutex workers_mutex;  // held by the caller that has the workers
bool forked = false;

void lock_before_fork() { workers_mutex.lock(); }
void unlock_in_parent() { workers_mutex.unlock(); }
void reset_in_child() {
    pool = nullptr;  // its workers exist only in the parent
    lateness = Lateness();
    forked = true;  // so do OpenMP's threads, and libgomp would wait for them forever
    workers_mutex.unlock();
}

// Registered at load time: a fork may come before our first job, but after torch's.
const int fork_handlers = pthread_atfork(lock_before_fork, unlock_in_parent, reset_in_child);

}  // namespace

void parallel_for(int64_t tasks, int threads, void (*body)(void*, int64_t), void* context) {
    if (tasks <= 1 || threads <= 1 || !workers_mutex.try_lock()) {
        const DefaultFloatingPoint mode;
        for (int64_t task = 0; task < tasks; task++) body(context, task);
        return;
    }
    std::lock_guard<std::mutex> lock(workers_mutex, std::adopt_lock);
    // `threads`, even for fewer tasks: an OpenMP team that changes its size with every job is slow to start
    Job job{body, context, tasks, threads - 1};
    if (borrows_openmp() && !lateness.are_late()) return borrow(job, openmp_parallel(), lateness);
    job.helpers = int(std::min<int64_t>(tasks, threads)) - 1;
    if (!pool) pool = new Pool;
    const Clock::time_point begin = Clock::now();
    pool->run(job, lateness.are_late() ? kAlone : microseconds(0));
    lateness.spend(Clock::now() - begin);
}

bool borrows_openmp() { return !forked && openmp_parallel() != nullptr; }

int pool_workers() {
    std::lock_guard<std::mutex> lock(workers_mutex);
    return pool ? pool->workers() : 0;
}

}  // namespace peftk
