// The protocol of a ticketed launch: who works on what, who waits for whom, who cleans up (docs/protocol.md).
//
// The counters are zero before a launch and after it:
//
//     [0]   tickets drawn
//     [1]   blocks that have left
//     [2]   tiles that have been published
//     then  arrivals at every tile that is cut into splits
#pragma once

#include "cuda/instructions.cuh"

namespace peftk::cuda::tickets {

enum Counter : int { kDrawn, kLeft, kPublished, kArrivals };

// The next ticket. Whoever drew a smaller one has started: a tile may wait for tiles with smaller tickets.
// `to_all` is shared memory.
__device__ inline int draw(int* counters, int& to_all) {
    if (threadIdx.x == 0) to_all = add_relaxed(counters + kDrawn, 1);
    __syncthreads();
    return to_all;
}

// What the threads of this block have stored is seen by whoever waits.
__device__ inline void publish(int* counters) {
    __syncthreads();
    if (threadIdx.x == 0) add_release(counters + kPublished, 1);
}

// Until `tiles` tiles have been published; a barrier of the block, too.
__device__ inline void wait_for(const int* counters, int tiles) {
    if (threadIdx.x == 0)
        while (load_acquire(counters + kPublished) < tiles) {
        }
    __syncthreads();
}

// Whether this block, which has stored its part of a tile, is the last of its splits: then it sees all parts. The
// counter is zero again then.
__device__ inline bool arrive_last(int* arrivals, int splits, int& to_all) {
    __syncthreads();
    if (threadIdx.x == 0) {
        to_all = add_acq_rel(arrivals, 1);
        if (to_all == splits - 1) *arrivals = 0;
    }
    __syncthreads();
    return to_all == splits - 1;
}

// Counts this block out; the last one leaves the counters at zero for the next launch. No barrier: of a block, thread 0
// alone touches counters.
__device__ inline void leave(int* counters) {
    if (threadIdx.x == 0 && add_acq_rel(counters + kLeft, 1) == int(gridDim.x) - 1)
        counters[kDrawn] = counters[kLeft] = counters[kPublished] = 0;
}

}  // namespace peftk::cuda::tickets
