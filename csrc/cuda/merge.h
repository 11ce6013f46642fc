// Merge and unmerge on a CUDA device.
#pragma once

#include <cuda_runtime.h>

#include "common/merge.h"

namespace peftk::cuda {

// Merge writes W' = round(fl(W + d)) and the code; unmerge reads W' and the code and writes W. All pointers are device
// pointers, those in `factors` too. Strides are in elements; `out` may be `weight` itself.
struct MergeArgs {
    const void* weight;  // [N, K], contiguous rows: W, or W' to unmerge
    int64_t weight_stride;
    void* out;  // [N, K], contiguous rows
    int64_t out_stride;
    MergeFactors factors;
    int8_t* code;  // [N, K], dense: written by merge, read by unmerge
    int64_t N, K;
    Dtype weight_dtype;
};

// Both enqueue one launch on `stream` of the current device and return its status; nothing waits for the device.
cudaError_t merge(const MergeArgs& args, cudaStream_t stream);
cudaError_t unmerge(const MergeArgs& args, cudaStream_t stream);

}  // namespace peftk::cuda
