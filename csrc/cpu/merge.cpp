#include "cpu/merge.h"

#include <sys/mman.h>

#include <algorithm>

#include "cpu/checksum.h"
#include "cpu/scratch.h"
#include "cpu/thread_pool.h"

namespace peftk {
namespace {

// Below this many multiply-adds for a thread, waking it costs more than it brings.
constexpr int64_t kWorkPerThread = 1 << 18;

int64_t groups_of(int64_t K) { return (K + kMergeGroup - 1) / kMergeGroup; }

// A fresh code is as many bytes as W has elements, and in small pages their faults cost more than all of the
// arithmetic. Advice: where the system knows no huge pages, nothing changes.
void prefer_huge_pages(void* memory, int64_t bytes) {
    constexpr uintptr_t kAlign = 1 << 16, kWorthwhile = 1 << 22;
    const uintptr_t first = (reinterpret_cast<uintptr_t>(memory) + kAlign - 1) & ~(kAlign - 1);
    const uintptr_t last = (reinterpret_cast<uintptr_t>(memory) + bytes) & ~(kAlign - 1);
    if (last > first + kWorthwhile) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
}

void pack(Level level, MergeSide& side, int64_t K, float* packed, int threads) {
    auto group = [&](int64_t g) { PEFTK_CALL(level, merge_pack, (side.factors, K, g, packed)); };
    parallel_for(groups_of(K), threads, group);
    side.packed = packed;
}

bool before(const RawWeight& a, const RawWeight& b) { return a.index < b.index; }

void run(Level level, const MergePass& pass, std::vector<MergeTask>& tasks, int threads) {
    auto rows_of = [&](int64_t i) {
        MergeTask& task = tasks[i];
        PEFTK_CALL(level, merge_rows, (pass, task));
        if (pass.undoing) return;
        std::sort(task.raws.begin(), task.raws.end(), before);
        if (pass.to.factors.adapters) {  // the rows are in the second-level cache
            task.checksum =
                checksum_of_rows(level, pass.weight, pass.stride, task.first_row, task.rows, pass.K, pass.dtype);
        }
    };
    parallel_for(int64_t(tasks.size()), threads, rows_of);
}

// Brings every block that the pass has written back to `from`, through the code and the raw weights of `to`. Allocates
// nothing: on this thread all scratch is there.
void undo(Level level, MergePass pass, std::vector<MergeTask>& tasks) {
    int never = 0;
    std::swap(pass.from, pass.to);
    pass.to.code = pass.from.code;  // a block's is read before it is written; nobody needs it any more
    pass.undoing = true;
    pass.stop = &never;
    for (MergeTask& task : tasks) {
        std::sort(task.raws.begin(), task.raws.end(), before);  // one that was interrupted has not done it
        task.raws_from = task.raws.data(), task.raws_from_end = task.raws_from + task.raws.size();
        task.most_blocks = task.blocks;
    }
    run(level, pass, tasks, 1);
}

}  // namespace

const RawWeight* first_raw(const RawWeight* first, const RawWeight* last, int64_t index) {
    return std::lower_bound(first, last, index, [](const RawWeight& raw, int64_t at) { return raw.index < at; });
}

void keep_raw(MergeTask& task, int64_t index, uint32_t bits) { task.raws.push_back({index, bits}); }

MergeResult remerge(MergePass pass, const std::vector<RawWeight>& raws, int threads) {
    const Level level = level_in_use();
    const int64_t ranks = pass.from.factors.R + pass.to.factors.R;
    const int64_t work = pass.N * pass.K * (ranks + 8);  // the code costs about as much as eight ranks
    threads = int(std::clamp<int64_t>(work / kWorkPerThread, 1, threads));

    // All that undo needs, on this thread, before W changes.
    float* packed = static_cast<float*>(scratch(kFactorSlot, groups_of(pass.K) * kMergeGroup * ranks * sizeof(float)));
    scratch(kRowsSlot, kMergeTaskRows * ranks * sizeof(float));
    std::vector<MergeTask> tasks((pass.N + kMergeTaskRows - 1) / kMergeTaskRows);
    for (size_t i = 0; i < tasks.size(); i++) {
        tasks[i].first_row = int64_t(i) * kMergeTaskRows;
        tasks[i].rows = std::min(kMergeTaskRows, pass.N - tasks[i].first_row);
        tasks[i].most_blocks = INT64_MAX;
        tasks[i].raws_from = raws.data(), tasks[i].raws_from_end = raws.data() + raws.size();
    }
    pack(level, pass.from, pass.K, packed, threads);
    pack(level, pass.to, pass.K, packed + groups_of(pass.K) * kMergeGroup * pass.from.factors.R, threads);
    if (pass.to.factors.adapters) prefer_huge_pages(pass.to.code, pass.N * pass.K);

    int stop = 0;
    pass.undoing = false;
    pass.stop = &stop;
    MergeResult result{true, 0, {}};
    try {
        run(level, pass, tasks, threads);
        if (!stop) {
            for (MergeTask& task : tasks) {
                result.raws.insert(result.raws.end(), task.raws.begin(), task.raws.end());
                result.checksum += task.checksum;
            }
            return result;
        }
    } catch (...) {
        undo(level, pass, tasks);
        throw;
    }
    undo(level, pass, tasks);
    return {false, 0, {}};
}

}  // namespace peftk
