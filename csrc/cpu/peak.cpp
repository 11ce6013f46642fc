#include "cpu/peak.h"

#include <algorithm>
#include <atomic>

#include "common/dtype.h"
#include "cpu/thread_pool.h"

namespace peftk {

namespace {
constexpr int64_t kTasksPerThread = 8;  // several, so that other threads take over the tasks of one that loses its core
constexpr int64_t kTaskBytes = 1 << 18;
}  // namespace

void fma_peak(int64_t multiply_adds, int dtype, int threads) {
    const Level level = level_in_use();
    const int64_t tasks = kTasksPerThread * threads, each = (multiply_adds + tasks - 1) / tasks;
    auto body = [&](int64_t) {
        float sum = 0.5f;
        PEFTK_CALL(level, fma_chains, (each, dtype == kBFloat16, &sum));
    };
    parallel_for(tasks, threads, body);
}

uint64_t read_peak(const void* from, int64_t bytes, int threads) {
    const Level level = level_in_use();
    std::atomic<uint64_t> total{0};
    auto body = [&](int64_t task) {
        const int64_t begin = task * kTaskBytes;
        uint64_t sum = 0;
        PEFTK_CALL(level, read_lines,
                   (static_cast<const char*>(from) + begin, std::min(kTaskBytes, bytes - begin), &sum));
        total += sum;
    };
    parallel_for((bytes + kTaskBytes - 1) / kTaskBytes, threads, body);
    return total;
}

}  // namespace peftk
