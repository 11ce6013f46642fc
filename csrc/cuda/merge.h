// Merge and unmerge on a CUDA device. The pointers of MergeArgs are device pointers.
#pragma once

#include <cuda_runtime.h>

#include "common/merge.h"

namespace peftk::cuda {

// Both enqueue one launch on `stream` of the current device and return its status; nothing waits for the device.
cudaError_t merge(const MergeArgs& args, cudaStream_t stream);
cudaError_t unmerge(const MergeArgs& args, cudaStream_t stream);

}  // namespace peftk::cuda
