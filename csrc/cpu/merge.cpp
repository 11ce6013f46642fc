#include "cpu/merge.h"

#include <algorithm>

#include "cpu/scratch.h"
#include "cpu/thread_pool.h"

namespace peftk {
namespace {

constexpr int64_t kTaskRows = 24;
// Below this many multiply-adds for a thread, waking it costs more than it brings.
constexpr int64_t kWorkPerThread = 1 << 18;

void run(const MergeArgs& args, int threads, bool unmerge) {
    if (args.N == 0 || args.K == 0) return;
    const Level level = level_in_use();
    const int64_t groups = (args.K + kMergeGroup - 1) / kMergeGroup;
    const int64_t work = args.N * args.K * (args.R + 8);  // the code costs about as much as eight ranks
    threads = int(std::clamp<int64_t>(work / kWorkPerThread, 1, threads));
    float* packed = static_cast<float*>(scratch(kFactorSlot, groups * args.R * kMergeGroup * sizeof(float)));

    auto pack = [&](int64_t group) { PEFTK_CALL(level, merge_pack, (args, group, packed)); };
    auto rows_of = [&](int64_t task) {
        const int64_t first = task * kTaskRows, rows = std::min(kTaskRows, args.N - first);
        if (unmerge) {
            PEFTK_CALL(level, unmerge_rows, (args, packed, first, rows));
        } else {
            PEFTK_CALL(level, merge_rows, (args, packed, first, rows));
        }
    };
    parallel_for(groups, threads, pack);
    parallel_for((args.N + kTaskRows - 1) / kTaskRows, threads, rows_of);
}

}  // namespace

void merge(const MergeArgs& args, int threads) { run(args, threads, false); }

void unmerge(const MergeArgs& args, int threads) { run(args, threads, true); }

}  // namespace peftk
