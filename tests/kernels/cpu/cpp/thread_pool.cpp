// Tests the thread pool alone: concurrent callers, changing thread counts, bodies that throw, memory that runs out,
// forks. tests/kernels/cpu/test_threads.py builds it with and without ThreadSanitizer. Prints what is wrong, if
// anything; the argument is how long to run.
#include "cpu/thread_pool.h"

#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <stdexcept>
#include <thread>
#include <vector>

#include "cpu/scratch.h"

namespace {

std::atomic<int> wrong{0};

void expect(bool fine, const char* what) {
    if (fine) return;
    wrong++;
    fprintf(stderr, "wrong: %s\n", what);
}

// Every task runs once. The counts are not atomic, but must be visible after parallel_for has returned.
void count(int tasks, int threads) {
    std::vector<int> done(tasks);
    auto body = [&](int64_t task) { done[task]++; };
    peftk::parallel_for(tasks, threads, body);
    bool once = true;
    for (int d : done) once = once && d == 1;
    expect(once, "every task is done once");
}

void fail(int tasks, int threads, int bad) {
    std::vector<int> done(tasks);
    auto body = [&](int64_t task) {
        if (task % bad == bad - 1) throw std::runtime_error("a task");
        done[task]++;
    };
    bool caught = false;
    try {
        peftk::parallel_for(tasks, threads, body);
    } catch (const std::runtime_error&) {
        caught = true;
    }
    expect(caught == (tasks >= bad), "a task's exception comes to the caller");
    for (int d : done) expect(d <= 1, "no task twice");
}

// Tasks wait for others that take longer than a thread spins, and see what they wrote.
void wait_for_slow_tasks(int threads) {
    int written[2] = {}, seen[6] = {};
    peftk::Latch slow(2);
    auto body = [&](int64_t task) {
        if (task < 2) {
            const peftk::Latch::CountOnExit part(slow);
            usleep(2000);
            written[task] = 1;
        } else {
            slow.wait();
            seen[task - 2] = written[0] + written[1];
        }
    };
    peftk::parallel_for(8, threads, body);
    for (int sum : seen) expect(sum == 2, "a task waits for the others");
}

void run_out_of_memory(int threads) {
    auto body = [&](int64_t) { peftk::scratch(peftk::kTileSlot, size_t(1) << 60); };
    bool caught = false;
    try {
        peftk::parallel_for(8, threads, body);
    } catch (const std::bad_alloc&) {
        caught = true;
    }
    expect(caught, "std::bad_alloc comes to the caller");
}

void call(int rounds, unsigned seed) {
    for (int round = 0; round < rounds; round++) {
        const int tasks = int(rand_r(&seed) % 40), threads = int(rand_r(&seed) % 6) + 1;
        count(tasks, threads);
        if (round % 5 == 0) fail(tasks, threads, int(rand_r(&seed) % 9) + 1);
        if (round % 50 == 0) run_out_of_memory(threads);
        if (round % 50 == 1) wait_for_slow_tasks(threads);
        if (round % 100 == 0) usleep(300);  // long enough for the workers to fall asleep
    }
}

// ThreadSanitizer cannot follow threads that a forked child starts, so there the child uses no threads.
#ifdef __SANITIZE_THREAD__
constexpr int kChildThreads = 1;
#else
constexpr int kChildThreads = 4;
#endif

void fork_once() {
    const pid_t child = fork();
    if (child == 0) {
        const int before = wrong;
        expect(peftk::pool_workers() == 0, "a child starts without workers");
        for (int i = 0; i < 20; i++) count(30, kChildThreads);
        fail(30, kChildThreads, 3);
        _exit(wrong == before && peftk::pool_workers() == kChildThreads - 1 ? 0 : 1);
    }
    int status = -1;
    waitpid(child, &status, 0);
    expect(status == 0, "a forked child works");
}

}  // namespace

int main(int argc, char** argv) {
    const int rounds = argc > 1 ? atoi(argv[1]) : 1000;
    call(rounds, 1);
    std::vector<std::thread> callers;
    for (unsigned seed = 2; seed < 5; seed++) callers.emplace_back(call, rounds, seed);
    for (int i = 0; i < 10; i++) fork_once();
    for (auto& caller : callers) caller.join();
    call(rounds, 6);
    return wrong ? 1 : 0;
}
