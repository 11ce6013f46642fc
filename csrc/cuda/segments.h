// Sorts the rows of a batch by adapter, on a CUDA device. docs/segments.md has the derivation and the costs.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/status.h"

namespace peftk::cuda {

// All pointers are device pointers. S = min(M, adapters + 1).
struct SegmentsArgs {
    const void* ids;  // [M]: the adapter of each row; an id outside 0 … adapters - 1 counts as -1, the base layer
    int64_t stride;   // of ids, in elements
    bool wide;        // whether ids are int64; else int32
    int64_t M, adapters;
    int64_t* order;   // [M]: the original row at each sorted place; rows of one adapter keep their order
    int* sorted_ids;  // [M]: the adapter at each sorted place, ascending
    int* ends;        // [1 + adapters]: the place after the last row of -1, of adapter 0, of adapter 1, …
    int* starts;      // [S + 1]: the first place of each non-empty segment, in order; then M
    int* owners;      // [S + 1]: the adapter of each of these segments; then -1
    int* blocks;      // [⌈M / 16⌉]: which of these segments contains place 16 · b
    int* workspace;   // [segments_workspace(M, adapters)], of any content
};

// The number of int32 of workspace that a call needs.
int64_t segments_workspace(int64_t M, int64_t adapters);

// Bytes of shared memory per block, of the launch that needs the most.
int64_t segments_shared(int64_t M);

// Enqueues one launch for up to 1,024 rows, else three. Their grids depend only on M and adapters, and the host does
// not wait for the device. Returns kAdapters for more than 2^20 adapters, and kRows for more rows than int32 can count.
Status segments(const SegmentsArgs& args, int device, cudaStream_t stream);

}  // namespace peftk::cuda
