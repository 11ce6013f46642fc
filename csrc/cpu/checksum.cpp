#include "cpu/checksum.h"

#include <algorithm>
#include <atomic>

#include "cpu/thread_pool.h"

namespace peftk {

namespace {
constexpr int64_t kTaskRows = 8;  // read together: the processor fetches ahead in each of them
constexpr int64_t kElementsPerThread = 1 << 18;
}  // namespace

uint64_t checksum(const void* weight, int64_t stride, int64_t N, int64_t K, Dtype dtype, int threads) {
    const Level level = level_in_use();
    std::atomic<uint64_t> total{0};
    const int64_t row_bytes = stride * size_of(dtype);
    auto add_rows = [&](int64_t task) {
        const int64_t first = task * kTaskRows, rows = std::min(kTaskRows, N - first);
        uint32_t sums[kTaskRows];
        const char* from = static_cast<const char*>(weight) + first * row_bytes;
        PEFTK_CALL(level, row_checksums, (from, row_bytes, rows, K, dtype, sums));
        uint64_t share = 0;
        for (int64_t i = 0; i < rows; i++) share += checksum_share(first + i, sums[i]);
        total += share;
    };
    threads = int(std::clamp<int64_t>(N * K / kElementsPerThread, 1, threads));
    parallel_for((N + kTaskRows - 1) / kTaskRows, threads, add_rows);
    return total;
}

}  // namespace peftk
