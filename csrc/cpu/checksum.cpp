#include "cpu/checksum.h"

#include <algorithm>
#include <atomic>

#include "cpu/thread_pool.h"

namespace peftk {

namespace {
constexpr int64_t kTaskRows = 32;
constexpr int64_t kElementsPerThread = 1 << 18;
}  // namespace

Inspection inspect(const void* weight, int64_t stride, int64_t N, int64_t K, Dtype dtype, int threads) {
    const Level level = level_in_use();
    const int64_t row_bytes = stride * (dtype == kFloat32 ? 4 : 2);
    // sums modulo 2⁶⁴ are the same in any order
    std::atomic<uint64_t> checksum{0};
    std::atomic<bool> finite{true};
    auto rows = [&](int64_t task) {
        uint64_t sum = 0;
        bool all = true;
        for (int64_t n = task * kTaskRows; n < std::min(N, (task + 1) * kTaskRows); n++) {
            Inspection row{0, true};
            PEFTK_CALL(level, inspect_row, (static_cast<const char*>(weight) + n * row_bytes, K, dtype, &row));
            sum += row.checksum * ((uint64_t(n) * 0x9E3779B97F4A7C15u) | 1);
            all = all && row.finite;
        }
        checksum += sum;
        if (!all) finite = false;
    };
    threads = int(std::clamp<int64_t>(N * K / kElementsPerThread, 1, threads));
    parallel_for((N + kTaskRows - 1) / kTaskRows, threads, rows);
    return {checksum, finite};
}

}  // namespace peftk
