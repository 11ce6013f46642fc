#include "cpu/merge.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu/checksum.h"
#include "cpu/scratch.h"
#include "cpu/thread_pool.h"

namespace peftk {
namespace {

// With fewer multiply-adds per thread, waking a thread costs more than it gains.
constexpr int64_t kWorkPerThread = 1 << 18;

int64_t group_count(int64_t K) { return (K + kMergeGroup - 1) / kMergeGroup; }

// Asks for huge pages: the page faults of a newly allocated code cost more in small pages than all of the arithmetic.
// This is only advice, without effect if the system has no huge pages.
void prefer_huge_pages(void* memory, int64_t bytes) {
    constexpr uintptr_t kAlign = 1 << 16, kWorthwhile = 1 << 22;
    const uintptr_t first = (reinterpret_cast<uintptr_t>(memory) + kAlign - 1) & ~(kAlign - 1);
    const uintptr_t last = (reinterpret_cast<uintptr_t>(memory) + bytes) & ~(kAlign - 1);
    if (last > first + kWorthwhile) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
}

void pack_side(Level level, const MergePass& pass, MergeSide& side, float* packed, int threads) {
    auto group = [&](int64_t g) { PEFTK_CALL(level, merge_pack, (side.factors, pass.dtype, pass.K, g, packed)); };
    parallel_for(group_count(pass.K), threads, group);
    side.packed = packed;
}

bool by_index(const RawWeight& a, const RawWeight& b) { return a.index < b.index; }

int64_t bytes_per_row(int64_t K) { return (K + 1) / 2; }

int8_t* codes_in_cache(ScratchSlot slot, const MergePass& pass, int64_t rows) {
    return static_cast<int8_t*>(scratch(slot, rows * pass.code_stride));
}

// Unpacks a task's codes of a side, one byte per code.
void unpack_codes(Level level, const MergePass& pass, const MergeSide& side, const MergeTask& task, const int8_t* far,
                  int8_t* codes) {
    int64_t count = 0;
    for (int64_t i = 0; i < task.rows; i++) {
        const uint8_t* halves = side.halves + (task.first_row + i) * bytes_per_row(pass.K);
        PEFTK_CALL(level, merge_unpack_codes, (halves, pass.K, far, codes + i * pass.code_stride, &count));
    }
}

// Packs a task's codes of `to`: halves into pass.to.halves, far codes into the task.
void pack_codes(Level level, const MergePass& pass, MergeTask& task) {
    int64_t count = 0;
    int8_t* far = static_cast<int8_t*>(scratch(kFarSlot, task.rows * pass.K));
    for (int64_t i = 0; i < task.rows; i++) {
        int8_t* codes = task.code_to + i * pass.code_stride;
        std::fill(codes + pass.K, codes + pass.code_stride, int8_t(0));
        uint8_t* halves = pass.to.halves + (task.first_row + i) * bytes_per_row(pass.K);
        PEFTK_CALL(level, merge_pack_codes, (codes, pass.K, halves, far, &count));
    }
    task.far.assign(far, far + count);
}

uint32_t bits_at(const void* raws, Dtype dtype, int64_t i) {
    return dtype == kFloat32 ? static_cast<const uint32_t*>(raws)[i] : static_cast<const uint16_t*>(raws)[i];
}

// The raw weights of `from` in a task's rows, with their indices.
std::vector<RawWeight> find_raws(const MergePass& pass, const MergeTask& task, int64_t count) {
    std::vector<RawWeight> raws;
    raws.reserve(count);
    for (int64_t i = 0; i < task.rows && int64_t(raws.size()) < count; i++) {
        const int8_t *codes = task.code_from + i * pass.code_stride, *code = codes, *end = codes + pass.K;
        for (; (code = static_cast<const int8_t*>(memchr(code, merge_code::kRaw, end - code))); code++) {
            const uint32_t bits = bits_at(pass.from.raws, pass.dtype, task.first_raw + int64_t(raws.size()));
            raws.push_back({(task.first_row + i) * pass.K + (code - codes), bits});
        }
    }
    return raws;
}

// Counts where each task's far codes and raw weights of `from` begin.
void find_task_codes(Level level, const MergePass& pass, std::vector<MergeTask>& tasks, int threads) {
    const int64_t row = bytes_per_row(pass.K);
    auto count = [&](int64_t i) {
        MergeTask& task = tasks[i];
        PEFTK_CALL(level, merge_count_far, (pass.from.halves + task.first_row * row, task.rows * row, &task.first_far));
    };
    parallel_for(int64_t(tasks.size()), threads, count);
    const int8_t* far = pass.from.far;
    int64_t fars = 0, raws = 0;
    for (MergeTask& task : tasks) {
        const int64_t more = task.first_far;
        task.first_far = fars, task.first_raw = raws;
        fars += more;
        if (fars > pass.from.far_count) break;
        raws += std::count(far + task.first_far, far + fars, int8_t(merge_code::kRaw));
    }
    if (fars != pass.from.far_count || raws != pass.from.raw_count) {
        throw std::invalid_argument("receipt: expected as many far codes and raw values as its code calls for, got " +
                                    std::to_string(pass.from.far_count) + " and " +
                                    std::to_string(pass.from.raw_count));
    }
}

// Restores `from` in the blocks that a task has written, using the codes `code_to` and the raw weights of `to`.
// Allocates nothing, since this thread already has all the scratch memory.
void undo(Level level, MergePass pass, MergeTask& task) {
    int no_stop = 0;
    std::swap(pass.from, pass.to);
    pass.undoing = true;
    pass.stop = &no_stop;
    std::sort(task.raws_to, task.raws_to + task.raw_count, by_index);
    task.raws_from = task.raws_to, task.raws_from_end = task.raws_to + task.raw_count;
    task.code_from = task.code_to;  // a block's codes are read before they are overwritten, and not needed after that
    task.max_blocks = task.blocks;
    PEFTK_CALL(level, merge_rows, (pass, task));
    task.complete = false;
}

// Runs a task: either to the end with all its results, or W's rows are restored.
void run_task(Level level, const MergePass& pass, MergeTask& task, int64_t raw_end) {
    task.code_to = codes_in_cache(kCodesToSlot, pass, task.rows);
    if (pass.to.factors.adapters) {
        task.raws_to = static_cast<RawWeight*>(scratch(kRawsSlot, task.rows * pass.K * sizeof(RawWeight)));
    }
    std::vector<RawWeight> raws_from;
    if (pass.from.factors.adapters) {
        int8_t* codes = codes_in_cache(kCodesFromSlot, pass, task.rows);
        task.code_from = codes;
        unpack_codes(level, pass, pass.from, task, pass.from.far + task.first_far, codes);
        raws_from = find_raws(pass, task, raw_end - task.first_raw);
    }
    task.raws_from = raws_from.data(), task.raws_from_end = task.raws_from + raws_from.size();
    try {
        PEFTK_CALL(level, merge_rows, (pass, task));
        if (task.complete && pass.to.factors.adapters) {
            std::sort(task.raws_to, task.raws_to + task.raw_count, by_index);
            task.raws.assign(task.raws_to, task.raws_to + task.raw_count);
            pack_codes(level, pass, task);
        }
    } catch (...) {
        undo(level, pass, task);
        throw;
    }
    if (!task.complete) undo(level, pass, task);
}

// Restores `from` in the rows of every complete task. Allocates nothing, like `undo`.
void undo_all(Level level, const MergePass& pass, std::vector<MergeTask>& tasks) {
    auto undo_one = [&](int64_t i) {
        MergeTask& task = tasks[i];
        if (!task.complete) return;
        task.raws_to = task.raws.data();
        task.code_to = codes_in_cache(kCodesToSlot, pass, task.rows);
        if (pass.to.factors.adapters) unpack_codes(level, pass, pass.to, task, task.far.data(), task.code_to);
        undo(level, pass, task);
    };
    parallel_for(int64_t(tasks.size()), 1, undo_one);
}

}  // namespace

const RawWeight* first_raw(const RawWeight* first, const RawWeight* last, int64_t index) {
    return std::lower_bound(first, last, index, [](const RawWeight& raw, int64_t at) { return raw.index < at; });
}

void remerge(MergePass pass, int threads, const std::function<void(const MergeResult&)>& on_result) {
    const Level level = level_in_use();
    const int64_t ranks = pass.from.factors.R + pass.to.factors.R;
    const int64_t work = pass.N * pass.K * (ranks + 8);  // the code costs about as much as eight ranks
    threads = int(std::clamp<int64_t>(work / kWorkPerThread, 1, threads));

    // Allocates all that undoing needs, on this thread, before W changes.
    float* packed =
        static_cast<float*>(scratch(kFactorSlot, group_count(pass.K) * kMergeGroup * ranks * sizeof(float)));
    scratch(kRowsSlot, 2 * kMergeTaskRows * ranks * sizeof(float));
    pass.code_stride = group_count(pass.K) * kMergeGroup;
    codes_in_cache(kCodesToSlot, pass, kMergeTaskRows);
    std::vector<MergeTask> tasks((pass.N + kMergeTaskRows - 1) / kMergeTaskRows);
    for (size_t i = 0; i < tasks.size(); i++) {
        tasks[i].first_row = int64_t(i) * kMergeTaskRows;
        tasks[i].rows = std::min(kMergeTaskRows, pass.N - tasks[i].first_row);
        tasks[i].max_blocks = INT64_MAX;
    }
    if (pass.from.factors.adapters) find_task_codes(level, pass, tasks, threads);
    pack_side(level, pass, pass.from, packed, threads);
    pack_side(level, pass, pass.to, packed + group_count(pass.K) * kMergeGroup * pass.from.factors.R, threads);
    if (pass.to.factors.adapters) prefer_huge_pages(pass.to.halves, pass.N * bytes_per_row(pass.K));

    int stop = 0;
    pass.undoing = false;
    pass.stop = &stop;
    auto run_one = [&](int64_t i) {
        run_task(level, pass, tasks[i], i + 1 < int64_t(tasks.size()) ? tasks[i + 1].first_raw : pass.from.raw_count);
    };
    try {
        parallel_for(int64_t(tasks.size()), threads, run_one);
        if (!stop) {
            MergeResult result{true, 0, {}, {}};
            for (MergeTask& task : tasks) {
                result.far.insert(result.far.end(), task.far.begin(), task.far.end());
                result.raws.insert(result.raws.end(), task.raws.begin(), task.raws.end());
                result.checksum += task.checksum;
            }
            return on_result(result);
        }
    } catch (...) {
        undo_all(level, pass, tasks);
        throw;
    }
    undo_all(level, pass, tasks);
    on_result({false, 0, {}, {}});
}

}  // namespace peftk
