// Communication between blocks: counters and their memory orders, fences, waiting.
#include "selfcheck.h"

namespace selfcheck {
namespace {

constexpr int kBlocks = 12, kThreads = 16;

// Each block stores a number, and the last one to arrive adds them up. `ticket` counts a block.
template <class Ticket>
__device__ void add_up(int* numbers, int* counter, int* sum, Ticket ticket) {
    if (threadIdx.x != 0) return;
    numbers[blockIdx.x] = int(blockIdx.x) + 1;
    if (ticket(counter) != kBlocks - 1) return;
    for (int block = 0; block < kBlocks; ++block) *sum += numbers[block];
}

template <class Kernel>
bool adds_up(Kernel kernel, bool broken) {
    auto left = numbers<int>(kBlocks, 0, 0), counter = numbers<int>(1, 0, 0), sum = numbers<int>(1, 0, 0);
    launch(kernel, kBlocks, kThreads, 0, left.get(), counter.get(), sum.get(), broken);
    return *sum.get() == kBlocks * (kBlocks + 1) / 2;
}

__global__ void release(int* numbers, int* counter, int* sum, bool broken) {
    add_up(numbers, counter, sum, [=](int* counter) {
        if (!broken) return peftk::cuda::add_acq_rel(counter, 1);
        const int ticket = peftk::cuda::add_relaxed(counter, 1);
        peftk::cuda::load_acquire(counter);
        return ticket;
    });
}
SELFCHECK(missing_release) { return adds_up(release, broken); }

__global__ void acquire(int* numbers, int* counter, int* sum, bool broken) {
    add_up(numbers, counter, sum, [=](int* counter) {
        return broken ? peftk::cuda::add_release(counter, 1) : peftk::cuda::add_acq_rel(counter, 1);
    });
}
SELFCHECK(missing_acquire) { return adds_up(acquire, broken); }

__global__ void first_fence(int* numbers, int* counter, int* sum, bool broken) {
    add_up(numbers, counter, sum, [=](int* counter) {
        if (!broken) __threadfence();
        const int ticket = atomicAdd(counter, 1);
        __threadfence();
        return ticket;
    });
}
SELFCHECK(missing_fence_before) { return adds_up(first_fence, broken); }

__global__ void second_fence(int* numbers, int* counter, int* sum, bool broken) {
    add_up(numbers, counter, sum, [=](int* counter) {
        __threadfence();
        const int ticket = atomicAdd(counter, 1);
        if (!broken) __threadfence();
        return ticket;
    });
}
SELFCHECK(missing_fence_after) { return adds_up(second_fence, broken); }

// One thread counts for the whole block. The barrier orders the others' writes before its count, and that before their
// reads.
__global__ void for_all(int* numbers, int* counter, int* sum, bool broken) {
    struct Shared {
        int ticket;
    };
    auto& shared = peftk::cuda::shared_memory<Shared>();
    if (threadIdx.x == 7) numbers[blockIdx.x] = int(blockIdx.x) + 1;
    if (!broken) __syncthreads();
    if (threadIdx.x == 0) shared.ticket = peftk::cuda::add_acq_rel(counter, 1);
    __syncthreads();
    if (shared.ticket != kBlocks - 1 || threadIdx.x != 9) return;
    for (int block = 0; block < kBlocks; ++block) *sum += numbers[block];
}
SELFCHECK(missing_barrier_before_release) {
    auto left = numbers<int>(kBlocks, 0, 0), counter = numbers<int>(1, 0, 0), sum = numbers<int>(1, 0, 0);
    launch(for_all, kBlocks, kThreads, sizeof(int), left.get(), counter.get(), sum.get(), broken);
    return *sum.get() == kBlocks * (kBlocks + 1) / 2;
}

// A counter that is read and written in two steps loses counts.
__global__ void two_steps(int* numbers, int* counter, int* sum, bool broken) {
    (void)numbers;
    if (threadIdx.x != 0) return;
    if (broken) {
        const int before = *counter;
        __threadfence();
        *counter = before + 1;
    } else {
        atomicAdd(counter, 1);
    }
    atomicAdd(sum, int(blockIdx.x) + 1);
}
SELFCHECK(lost_update) {
    auto left = numbers<int>(kBlocks, 0, 0), counter = numbers<int>(1, 0, 0), sum = numbers<int>(1, 0, 0);
    launch(two_steps, kBlocks, kThreads, 0, left.get(), counter.get(), sum.get(), broken);
    return counter[0] == kBlocks && sum[0] == kBlocks * (kBlocks + 1) / 2;
}

// A chain through all blocks. In the order of their tickets, each waits for a block that has started. In the order of
// their numbers, it may wait for one that has not, and never will if there is no room.
__global__ void chain(int* ticket, int* turn, int* out, bool broken) {
    if (threadIdx.x != 0) return;
    const int mine = broken ? int(blockIdx.x) : peftk::cuda::add_relaxed(ticket, 1);
    while (peftk::cuda::load_acquire(turn) != mine) {
    }
    out[0] = 2 * out[0] % 1009 + mine;
    peftk::cuda::add_release(turn, 1);
}
SELFCHECK(waits_for_a_block_that_has_not_started) {
    auto ticket = numbers<int>(1, 0, 0), turn = numbers<int>(1, 0, 0), out = numbers<int>(1, 1, 0);
    launch(chain, kBlocks, kThreads, 0, ticket.get(), turn.get(), out.get(), broken);
    int expected = 1;
    for (int i = 0; i < kBlocks; ++i) expected = 2 * expected % 1009 + i;
    return out[0] == expected;
}

}  // namespace
}  // namespace selfcheck
