// Tests when jobs borrow OpenMP's threads, with a runtime of our own whose threads come late on demand.
// tests/kernels/cpu/test_threads.py builds it. Prints what is wrong, if anything.
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <thread>

#include "cpu/openmp.h"
#include "cpu/thread_pool.h"

namespace {

int wrong = 0, borrowed = 0, delay_ms = 0;
bool another_computes = false;

void expect(bool fine, const char* what) {
    if (fine) return;
    wrong++;
    fprintf(stderr, "wrong: %s\n", what);
}

// The caller does all the work, then waits for threads that have none left. Or another thread does it.
void parallel(void (*body)(void*), void* context, unsigned, unsigned) {
    borrowed++;
    if (another_computes) std::thread(body, context).join();
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
    const auto end = std::chrono::steady_clock::now() + std::chrono::microseconds(250);
    while (std::chrono::steady_clock::now() < end) {
    }
}

// Runs jobs until one borrows OpenMP's threads. Returns how long that took, in ms.
double until_borrowed() {
    const auto begin = std::chrono::steady_clock::now();
    for (const int before = borrowed; borrowed == before;) job();
    return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - begin).count();
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
    const double first = until_borrowed();
    const double second = until_borrowed();
    expect(first >= 2, "late threads are avoided for some time");
    expect(second >= 4 * 4 * 2, "threads that come late again are avoided for longer");

    delay_ms = 0;
    until_borrowed();
    for (int i = 0; i < 200; i++) job(300);  // long enough to forget
    delay_ms = 2;
    job();
    delay_ms = 0;
    expect(until_borrowed() < second, "threads that were in time for long are avoided shortly");

    auto body = [](int64_t) { compute_for_a_moment(); };
    bool in_time = false;
    for (int i = 0; i < 20 && !in_time; i++) {  // on a busy machine the other thread may really come late
        until_borrowed();
        another_computes = true;
        peftk::parallel_for(4, 3, body);
        another_computes = false;
        const int before = borrowed;
        job();
        in_time = borrowed == before + 1;
    }
    expect(in_time, "a thread that computed for longer than the caller is not late");
    return wrong ? 1 : 0;
}
