// Merge and unmerge on the CPU, at the SIMD level in use.
#pragma once

#include "common/merge.h"
#include "cpu/levels.h"

namespace peftk {

// A column group is what a register tile covers: kMergeGroup floats at every level, so that one layout serves all.
constexpr int64_t kMergeGroup = 64;

// One level's kernels. `packed` holds A widened to fp32 as [groups][R][kMergeGroup], the last group padded with zeros.
PEFTK_DECLARE(void, merge_pack, (const MergeArgs& args, int64_t group, float* packed))
PEFTK_DECLARE(void, merge_rows, (const MergeArgs& args, const float* packed, int64_t first_row, int64_t rows))
PEFTK_DECLARE(void, unmerge_rows, (const MergeArgs& args, const float* packed, int64_t first_row, int64_t rows))

void merge(const MergeArgs& args, int threads);
void unmerge(const MergeArgs& args, int threads);

}  // namespace peftk
