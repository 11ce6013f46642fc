// The protocol of a ticketed launch: which block works on which tile, waits for which, and resets the counters
// (docs/protocol.md).
//
// The counters are zero before and after a launch:
//
//     [0]   tickets drawn
//     [1]   blocks that have left
//     [2]   tiles that have been published
//     then  arrivals at each tile that is split
#pragma once

#include "cuda/instructions.cuh"

namespace peftk::cuda::tickets {

enum Counter : int { kDrawn, kLeft, kPublished, kArrivals };

// The next ticket. Blocks with smaller tickets have started, so a tile may wait for tiles with smaller tickets.
// `broadcast` is in shared memory.
__device__ inline int draw(int* counters, int& broadcast) {
    if (threadIdx.x == 0) broadcast = add_relaxed(counters + kDrawn, 1);
    __syncthreads();
    return broadcast;
}

// Makes the stores of this block's threads visible to blocks that wait.
__device__ inline void publish(int* counters) {
    __syncthreads();
    if (threadIdx.x == 0) add_release(counters + kPublished, 1);
}

// Waits until `tiles` tiles have been published. Also a barrier of the block.
__device__ inline void wait_for(const int* counters, int tiles) {
    if (threadIdx.x == 0)
        while (load_acquire(counters + kPublished) < tiles) {
        }
    __syncthreads();
}

// Counts this block, which has stored its part of a tile. Returns whether it is the last of the tile's splits: then it
// sees all parts, and the counter has been reset to zero.
__device__ inline bool arrive_last(int* arrivals, int splits, int& broadcast) {
    __syncthreads();
    if (threadIdx.x == 0) {
        broadcast = add_acq_rel(arrivals, 1);
        if (broadcast == splits - 1) *arrivals = 0;
    }
    __syncthreads();
    return broadcast == splits - 1;
}

// Counts this block as finished. The last one resets the counters to zero for the next launch. No barrier is needed,
// since only thread 0 of a block touches counters.
__device__ inline void leave(int* counters) {
    if (threadIdx.x == 0 && add_acq_rel(counters + kLeft, 1) == int(gridDim.x) - 1)
        counters[kDrawn] = counters[kLeft] = counters[kPublished] = 0;
}

}  // namespace peftk::cuda::tickets
