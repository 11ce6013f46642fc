// The rows of a batch in the order of their adapters, on a CUDA device. docs/segments.md derives and counts it.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/status.h"

namespace peftk::cuda {

// Device pointers all of them. S = min(M, adapters + 1).
struct SegmentsArgs {
    const void* ids;  // [M]: the adapter of each row; what is outside of 0 … adapters - 1 counts as -1, the base layer
    int64_t stride;   // of ids, in elements
    bool wide;        // ids are int64, else int32
    int64_t M, adapters;
    int64_t* order;   // [M]: the original row at each sorted place; rows of one adapter keep their order
    int* sorted_ids;  // [M]: the adapter at each sorted place, ascending
    int* ends;        // [1 + adapters]: the place after the last row of -1, of adapter 0, of adapter 1, …
    int* starts;      // [S + 1]: the first place of each non-empty segment, in order; M from their number on
    int* owners;      // [S + 1]: the adapter of each of these segments; -1 from their number on
    int* blocks;      // [⌈M / 16⌉]: which of these segments holds place 16 · b
    int* workspace;   // [segments_workspace(M, adapters)], of any content
};

// How many int32 of workspace a call needs.
int64_t segments_workspace(int64_t M, int64_t adapters);

// Bytes of shared memory of a block of the launch, or of the largest of the three.
int64_t segments_shared(int64_t M);

// Enqueues one launch for up to 1,024 rows and three beyond, of grids that depend on M and adapters alone; nothing
// waits for the device. Answers kAdapters for more than 2^20 adapters and kRows for more rows than places in int32.
Status segments(const SegmentsArgs& args, int device, cudaStream_t stream);

}  // namespace peftk::cuda
