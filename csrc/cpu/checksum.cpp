#include "cpu/checksum.h"

#include <algorithm>
#include <atomic>

#include "cpu/thread_pool.h"

namespace peftk {

namespace {
constexpr int64_t kTaskRows = 32;
constexpr int64_t kElementsPerThread = 1 << 18;
}  // namespace

uint64_t checksum_of_rows(Level level, const void* weight, int64_t stride, int64_t first, int64_t rows, int64_t K,
                          Dtype dtype) {
    uint64_t share = 0;
    for (int64_t n = first; n < first + rows; n++) {
        uint32_t sum = 0;
        const char* row = static_cast<const char*>(weight) + n * stride * size_of(dtype);
        PEFTK_CALL(level, row_checksum, (row, K, dtype, &sum));
        share += sum * ((uint64_t(n) * 0x9E3779B97F4A7C15u) | 1);
    }
    return share;
}

uint64_t checksum(const void* weight, int64_t stride, int64_t N, int64_t K, Dtype dtype, int threads) {
    const Level level = level_in_use();
    std::atomic<uint64_t> total{0};
    auto add_rows = [&](int64_t task) {
        const int64_t first = task * kTaskRows;
        total += checksum_of_rows(level, weight, stride, first, std::min(kTaskRows, N - first), K, dtype);
    };
    threads = int(std::clamp<int64_t>(N * K / kElementsPerThread, 1, threads));
    parallel_for((N + kTaskRows - 1) / kTaskRows, threads, add_rows);
    return total;
}

}  // namespace peftk
