// Tests when jobs borrow OpenMP's threads, with a runtime of our own whose threads come late on demand.
// tests/kernels/cpu/test_threads.py builds it. Prints what is wrong, if anything.
#include <time.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <thread>

#include "cpu/openmp.h"
#include "cpu/thread_pool.h"

namespace {

int wrong = 0, borrowed = 0, delay_ms = 0;
bool another_computes = false;
double disturbed_ms = 0;

void expect(bool fine, const char* what) {
    if (fine) return;
    wrong++;
    fprintf(stderr, "wrong: %s\n", what);
}

// What this thread has had of a processor, in ms.
double processor_ms() {
    timespec time{};
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
    return double(time.tv_sec) * 1e3 + double(time.tv_nsec) / 1e6;
}

double now_ms() {
    return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// The caller does all the work, then waits for threads that have none left. Or another thread does it first;
// `disturbed` is the time in which that one had no processor.
void parallel(void (*body)(void*), void* context, unsigned, unsigned) {
    borrowed++;
    if (another_computes) {
        double computed = 0;
        const double begin = now_ms();
        std::thread([&] { body(context), computed = processor_ms(); }).join();
        disturbed_ms = now_ms() - begin - computed;
    }
    body(context);
    if (delay_ms > 0) usleep(unsigned(delay_ms) * 1000);
}

void job(unsigned task_us = 0) {
    int done[4] = {};
    auto body = [&](int64_t task) {
        if (task_us > 0) usleep(task_us);
        done[task]++;
    };
    peftk::parallel_for(4, 3, body);
    for (int count : done) expect(count == 1, "every task is done once");
}

void compute_for_a_moment() {
    for (const double end = now_ms() + 1; now_ms() < end;) {
    }
}

}  // namespace

namespace peftk {
OpenMpParallel openmp_parallel() { return parallel; }
}  // namespace peftk

int main() {
    for (int i = 1; i <= 10; i++) {
        job();
        expect(borrowed == i, "threads in time are borrowed again");
    }
    delay_ms = 50;
    job(), job();
    expect(borrowed == 12, "a quota's wait is not a delay");
    expect(peftk::pool_workers() == 0, "our own threads begin with the first delay");

    delay_ms = 2;
    job();
    job(300);
    expect(borrowed == 13, "late threads are not borrowed by the next job");
    expect(peftk::pool_workers() > 0, "a job of more than a moment has our own threads meanwhile");
    delay_ms = 0;

    auto body = [](int64_t) { compute_for_a_moment(); };
    for (int i = 0; i < 5; i++) {
        for (const int before = borrowed; borrowed == before;) job(10'000);
        another_computes = true;
        peftk::parallel_for(4, 3, body);
        another_computes = false;
        if (disturbed_ms > 0.3) continue;  // on a busy machine it did come late
        const int before = borrowed;
        job();
        expect(borrowed == before + 1, "a thread that computed for longer than the caller is not late");
        break;
    }
    return wrong ? 1 : 0;
}
