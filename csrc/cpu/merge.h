// Merge and unmerge on the CPU, alone or in one pass, in place, at the SIMD level in use.
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

// A weight whose distance has no code: its index in the flattened W, and its bits.
struct RawWeight {
    int64_t index;
    uint32_t bits;
};

// What W contains before or after a pass: these adapters, which these codes undo. No adapters: W is the base layer's.
struct MergeSide {
    MergeFactors factors;
    uint8_t* halves;  // [N, (K + 1) / 2], dense: two codes per byte (common/merge.h), the even column in the low half
    const float* packed;  // A, see merge_pack; set by the pass
    const int8_t* far;    // for `from`: the codes that do not fit into a half, in the order of elements
    int64_t far_count;
    const void* raws;  // for `from`: the bits of the weights whose code is raw, in W's width, in the order of elements
    int64_t raw_count;
};

struct MergePass {
    void* weight;  // [N, K], contiguous rows, changed in place
    int64_t stride, N, K;
    Dtype dtype;
    MergeSide from, to;   // `from` is unmerged exactly, then `to` is merged and its codes are written
    int64_t code_stride;  // of a task's codes; set by the pass
    bool undoing;         // undoes a pass: raw weights of `to` are known, so none are collected and nothing allocates
    int* stop;            // set to 1 if a block would not be finite
};

// A task: some rows of W, processed in blocks in a fixed order. Whenever it ends, W contains `to` in the first `blocks`
// blocks and `from` in the rest. Codes and raw weights undo a block whether or not it is finite.
struct MergeTask {
    int64_t first_row, rows;
    int64_t max_blocks;                          // at most this many are processed
    int64_t blocks;                              // how many have been processed
    bool complete;                               // whether all have been processed
    int8_t *code_from, *code_to;                 // [rows, code_stride], one byte per code, in this thread's scratch
    const RawWeight *raws_from, *raws_from_end;  // ascending
    int64_t first_far, first_raw;                // of `from`: how many are in the rows before this task's
    RawWeight* raws_to;                          // of `to`, in this thread's scratch, where each weight has room
    int64_t raw_count;                           // how many `raws_to` has
    std::vector<RawWeight> raws;                 // of `to`, ascending, when the task is complete
    std::vector<int8_t> far;                     // of `to`, likewise
    uint64_t checksum;                           // of `to`, this task's share
};

// Rows of a task: a multiple of the rows of a register tile at any level.
constexpr int64_t kMergeTaskRows = 24;
// Columns of a group: the same at every level, so that all levels share one layout of packed A.
constexpr int64_t kMergeGroup = 64;

// One level's kernels. `packed` is A widened to fp32 as [groups][R][kMergeGroup], the last group padded with zeros. A
// level orders the columns of a group as W's dtype needs it.
PEFTK_DECLARE(void, merge_pack, (const MergeFactors& factors, Dtype dtype, int64_t K, int64_t group, float* packed))
PEFTK_DECLARE(void, merge_rows, (const MergePass& pass, MergeTask& task))
// Convert a row of codes to halves and back. `code` has room for K rounded up to kMergeGroup; when packing, the codes
// after K must be zero. Both add the number of far codes to `*far_count`, and write or read them at `far`.
PEFTK_DECLARE(void, merge_pack_codes, (const int8_t* code, int64_t K, uint8_t* halves, int8_t* far, int64_t* far_count))
PEFTK_DECLARE(void, merge_unpack_codes,
              (const uint8_t* halves, int64_t K, const int8_t* far, int8_t* code, int64_t* far_count))
PEFTK_DECLARE(void, merge_count_far, (const uint8_t* halves, int64_t bytes, int64_t* far_count))

// Called by the kernels: finds the first of [first, last) whose index is at least `index`.
const RawWeight* first_raw(const RawWeight* first, const RawWeight* last, int64_t index);

struct MergeResult {
    bool finite;                  // if false, W is unchanged
    uint64_t checksum;            // of W after the pass; 0 if that is the base layer's
    std::vector<int8_t> far;      // of `to`, in the order of elements
    std::vector<RawWeight> raws;  // ascending
};

// One pass over W. Calls `on_result` with the result while the pass can still be undone. Throws what `on_result`
// throws, std::bad_alloc, and std::invalid_argument if the codes of `from` do not match. W is then unchanged.
void remerge(MergePass pass, int threads, const std::function<void(const MergeResult&)>& on_result);

}  // namespace peftk
