// Merge, unmerge and both at once on the CPU, in place, at the SIMD level in use.
#pragma once

#include <functional>
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

// What W holds, before or after a pass: these adapters, undone by these codes. No adapters: W is the base layer's.
struct MergeSide {
    MergeFactors factors;
    uint8_t* halves;  // [N, (K + 1) / 2], dense: two codes a byte, see common/merge.h; the even column's is the low one
    const float* packed;  // A, see merge_pack; the pass fills it in
    const int8_t* far;    // of `from`: the codes that no half holds, in order of place
    int64_t far_count;
    const void* raws;  // of `from`: the bits of the weights whose code is raw, in W's width, in order of place
    int64_t raw_count;
};

struct MergePass {
    void* weight;  // [N, K], contiguous rows, changed in place
    int64_t stride, N, K;
    Dtype dtype;
    MergeSide from, to;   // `from` is taken out of W exactly, then `to` is put in and its codes written
    int64_t code_stride;  // of a task's codes; the pass fills it in
    bool undoing;         // raw weights of `to` are known, so that nothing is kept and no memory needed
    int* stop;            // becomes 1 where a block would not be finite
};

// A task's rows. It walks them in blocks, in the same order always; a block is written to W when all of it is known to
// be right, so W holds `to` in the first `blocks` of them and `from` in the rest, whenever the task ends.
struct MergeTask {
    int64_t first_row, rows;
    int64_t most_blocks;                         // how many to do
    int64_t blocks;                              // how many are done
    bool whole;                                  // all of them
    const int8_t* code_from;                     // [rows, code_stride], a byte each, in this thread's cache
    int8_t* code_to;                             // the same
    const RawWeight *raws_from, *raws_from_end;  // ascending
    int64_t first_far, first_raw;                // of `from`: how many the rows before this task's have
    std::vector<RawWeight> raws;                 // of `to`
    std::vector<int8_t> far;                     // of `to`
    uint64_t checksum;                           // this task's share
};

// Rows of a task: a multiple of what any level puts into a register tile.
constexpr int64_t kMergeTaskRows = 24;
// A column group is what a register tile covers: kMergeGroup floats at every level, so that one layout serves all.
constexpr int64_t kMergeGroup = 64;

// One level's kernels. `packed` is A widened to fp32 as [groups][R][kMergeGroup], the last group padded with zeros.
PEFTK_DECLARE(void, merge_pack, (const MergeFactors& factors, int64_t K, int64_t group, float* packed))
PEFTK_DECLARE(void, merge_rows, (const MergePass& pass, MergeTask& task))
// A row of codes to halves and back. `code` has room for K rounded up to kMergeGroup; to be packed, zeros after the K.
// Adds to `*far_count` how many are far, and writes or reads these at `far`.
PEFTK_DECLARE(void, merge_pack_codes, (const int8_t* code, int64_t K, uint8_t* halves, int8_t* far, int64_t* far_count))
PEFTK_DECLARE(void, merge_unpack_codes,
              (const uint8_t* halves, int64_t K, const int8_t* far, int8_t* code, int64_t* far_count))
PEFTK_DECLARE(void, merge_count_far, (const uint8_t* halves, int64_t bytes, int64_t* far_count))

// What they call back. The first of [first, last) whose index is `index` or more; and one more raw weight of `to`.
const RawWeight* first_raw(const RawWeight* first, const RawWeight* last, int64_t index);
void keep_raw(MergeTask& task, int64_t index, uint32_t bits);

struct MergeResult {
    bool finite;                  // else W is as it was
    uint64_t checksum;            // of W after the pass; 0 where it holds the base layer's
    std::vector<int8_t> far;      // of `to`, in order of place
    std::vector<RawWeight> raws;  // ascending
};

// One pass over W. `hand_over` has the result while all can still be undone. Throws what that throws, std::bad_alloc,
// and std::invalid_argument where the codes of `from` don't belong together: with W as it was.
void remerge(MergePass pass, int threads, const std::function<void(const MergeResult&)>& hand_over);

}  // namespace peftk
