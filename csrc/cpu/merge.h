// Merge, unmerge and both at once on the CPU, in place, at the SIMD level in use.
#pragma once

#include <vector>

#include "common/dtype.h"
#include "common/merge.h"
#include "cpu/levels.h"

namespace peftk {

// The adapters of one merge, side by side. Adapter t has the ranks from ends[t - 1] (0 for the first) to ends[t] - 1:
//
//     d_t = fl(scaling[t] * chain of fma over its ranks, ascending, from +0);   d = d_0, then d = fl(d + d_t) in order
struct MergeFactors {
    const void* lora_A;    // [R, K], dense
    const void* lora_B;    // [N, R], dense
    const int64_t* ends;   // [adapters], ascending; the last one is R
    const float* scaling;  // [adapters]
    int64_t adapters, R;
    Dtype dtype;
};

// A weight whose distance has no code: its place in the flattened W, and its bits.
struct RawWeight {
    int64_t index;
    uint32_t bits;
};

// What W holds, before or after a pass: these adapters, undone by this code. No adapters: W is the base layer's.
struct MergeSide {
    MergeFactors factors;
    int8_t* code;         // [N, K], dense
    const float* packed;  // A, see merge_pack; the pass fills it in
};

struct MergePass {
    void* weight;  // [N, K], contiguous rows, changed in place
    int64_t stride, N, K;
    Dtype dtype;
    MergeSide from, to;  // `from` is taken out of W exactly, then `to` is put in and its code written
    bool undoing;        // raw weights of `to` are known, so that nothing is kept and no memory needed
    int* stop;           // becomes 1 where a block would not be finite
};

// A task's rows. It walks them in blocks, in the same order always; a block is written to W when all of it is known to
// be right, so W holds `to` in the first `blocks` of them and `from` in the rest, whenever the task ends.
struct MergeTask {
    int64_t first_row, rows;
    int64_t most_blocks;                         // how many to do
    int64_t blocks;                              // how many are done
    const RawWeight *raws_from, *raws_from_end;  // ascending
    std::vector<RawWeight> raws;                 // of `to`
    uint64_t checksum;                           // this task's share
};

// Rows of a task: a multiple of what any level puts into a register tile.
constexpr int64_t kMergeTaskRows = 24;
// A column group is what a register tile covers: kMergeGroup floats at every level, so that one layout serves all.
constexpr int64_t kMergeGroup = 64;

// One level's kernels. `packed` is A widened to fp32 as [groups][R][kMergeGroup], the last group padded with zeros.
PEFTK_DECLARE(void, merge_pack, (const MergeFactors& factors, int64_t K, int64_t group, float* packed))
PEFTK_DECLARE(void, merge_rows, (const MergePass& pass, MergeTask& task))

// What they call back. The first of [first, last) whose index is `index` or more; and one more raw weight of `to`.
const RawWeight* first_raw(const RawWeight* first, const RawWeight* last, int64_t index);
void keep_raw(MergeTask& task, int64_t index, uint32_t bits);

struct MergeResult {
    bool finite;                  // else W is as it was
    uint64_t checksum;            // of W after the pass; 0 where it holds the base layer's
    std::vector<RawWeight> raws;  // ascending
};

// One pass over W: raws are those of `from`, ascending. Throws std::bad_alloc, with W as it was.
MergeResult remerge(MergePass pass, const std::vector<RawWeight>& raws, int threads);

}  // namespace peftk
