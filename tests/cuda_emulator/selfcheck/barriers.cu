// Barriers of blocks and warps, and shared memory.
#include "selfcheck.h"

namespace selfcheck {
namespace {

constexpr int kThreads = 64, kBlocks = 3;

struct Shared {
    float values[kThreads];
};

// Every thread reads what the thread `apart` from it has written.
template <class Kernel>
bool neighbours(Kernel kernel, bool broken, int apart) {
    auto out = numbers<float>(kBlocks * kThreads, 0, 0);
    launch(kernel, kBlocks, kThreads, sizeof(Shared), out.get(), broken);
    for (int block = 0; block < kBlocks; ++block)
        for (int t = 0; t < kThreads; ++t)
            if (out[block * kThreads + t] != float(1000 * block + (t ^ apart))) return false;
    return true;
}

__global__ void across_warps(float* out, bool broken) {
    auto& shared = peftk::cuda::shared_memory<Shared>();
    const int t = threadIdx.x;
    shared.values[t] = float(1000 * blockIdx.x + t);
    if (!broken) __syncthreads();
    out[blockIdx.x * kThreads + t] = shared.values[t ^ 32];
}
SELFCHECK(missing_barrier) { return neighbours(across_warps, broken, 32); }

__global__ void before_overwriting(float* out, bool broken) {
    auto& shared = peftk::cuda::shared_memory<Shared>();
    const int t = threadIdx.x;
    float sum = 0;
    for (int round = 0; round < 3; ++round) {
        shared.values[t] = float(1000 * blockIdx.x + t) * float(round - 1) + float(round);
        __syncthreads();
        sum += shared.values[t ^ 32] * float(round);  // 1 · 1 + (value + 2) · 2
        if (!broken) __syncthreads();
    }
    out[blockIdx.x * kThreads + t] = (sum - 5) / 2;
}
SELFCHECK(missing_barrier_before_overwriting) { return neighbours(before_overwriting, broken, 32); }

__global__ void within_warps(float* out, bool broken) {
    auto& shared = peftk::cuda::shared_memory<Shared>();
    const int t = threadIdx.x;
    shared.values[t] = float(1000 * blockIdx.x + t);
    if (!broken) __syncwarp();
    out[blockIdx.x * kThreads + t] = shared.values[t ^ 1];
}
SELFCHECK(missing_warp_barrier) { return neighbours(within_warps, broken, 1); }

// A shuffle synchronizes lanes, but does not order memory accesses.
__global__ void shuffle_for_barrier(float* out, bool broken) {
    auto& shared = peftk::cuda::shared_memory<Shared>();
    const int t = threadIdx.x;
    shared.values[t] = float(1000 * blockIdx.x + t);
    if (broken) {
        __shfl_sync(~0u, t, 0);
    } else {
        __syncwarp();
    }
    out[blockIdx.x * kThreads + t] = shared.values[t ^ 1];
}
SELFCHECK(shuffle_is_no_barrier) { return neighbours(shuffle_for_barrier, broken, 1); }

__global__ void branch(float* out, bool broken) {
    auto& shared = peftk::cuda::shared_memory<Shared>();
    const int t = threadIdx.x;
    shared.values[t] = float(1000 * blockIdx.x + t);
    if (!broken || t % 2) __syncthreads();
    out[blockIdx.x * kThreads + t] = shared.values[t ^ 32];
}
SELFCHECK(barrier_in_a_branch) { return neighbours(branch, broken, 32); }

__global__ void two_branches(float* out, bool broken) {
    auto& shared = peftk::cuda::shared_memory<Shared>();
    const int t = threadIdx.x;
    shared.values[t] = float(1000 * blockIdx.x + t);
    if (broken && t < 32) {
        __syncthreads();
    } else {
        __syncthreads();
    }
    out[blockIdx.x * kThreads + t] = shared.values[t ^ 32];
}
SELFCHECK(two_different_barriers) { return neighbours(two_branches, broken, 32); }

__global__ void early(float* out, bool broken) {
    auto& shared = peftk::cuda::shared_memory<Shared>();
    const int t = threadIdx.x;
    shared.values[t] = float(1000 * blockIdx.x + t);
    if (broken && t >= 40) return;
    __syncthreads();
    out[blockIdx.x * kThreads + t] = shared.values[t ^ 32];
}
SELFCHECK(return_before_a_barrier) { return neighbours(early, broken, 32); }

__global__ void unwritten(float* out, bool broken) {
    auto& shared = peftk::cuda::shared_memory<Shared>();
    const int t = threadIdx.x;
    if (!broken || t != 33) shared.values[t] = float(1000 * blockIdx.x + t);
    __syncthreads();
    out[blockIdx.x * kThreads + t] = shared.values[t ^ 32];
}
SELFCHECK(uninitialised_shared_memory) { return neighbours(unwritten, broken, 32); }

__global__ void past_shared(float* out, bool broken) {
    auto& shared = peftk::cuda::shared_memory<Shared>();
    const int t = threadIdx.x;
    float* values = shared.values;
    values[t] = float(1000 * blockIdx.x + t);
    __syncthreads();
    out[blockIdx.x * kThreads + t] = values[broken && t == 3 ? kThreads : t ^ 32];
}
SELFCHECK(out_of_bounds_shared) { return neighbours(past_shared, broken, 32); }

__global__ void past_global(float* out, bool broken) {
    const int i = blockIdx.x * kThreads + threadIdx.x;
    out[broken ? i + 1 : i] = float(1000 * blockIdx.x + threadIdx.x);
}
SELFCHECK(out_of_bounds_global) { return neighbours(past_global, broken, 0); }

struct Large {
    float values[kThreads + 1];
};
__global__ void large(float* out, bool broken) {
    float* values = broken ? peftk::cuda::shared_memory<Large>().values : peftk::cuda::shared_memory<Shared>().values;
    values[threadIdx.x] = float(1000 * blockIdx.x + threadIdx.x);
    out[blockIdx.x * kThreads + threadIdx.x] = values[threadIdx.x];
}
SELFCHECK(layout_larger_than_launched) { return neighbours(large, broken, 0); }

__global__ void wide(float* out, bool broken) {
    float* to = out + blockIdx.x * kThreads + 4 * threadIdx.x;
    const float first = float(1000 * blockIdx.x + 4 * threadIdx.x);
    if (broken && threadIdx.x < kThreads / 4 - 1) ++to;
    *reinterpret_cast<float4*>(to) = make_float4(first, first + 1, first + 2, first + 3);
}
SELFCHECK(misaligned_access) {
    void* out;
    if (posix_memalign(&out, 16, kBlocks * kThreads * sizeof(float))) return false;
    launch(wide, kBlocks, kThreads / 4, 0, static_cast<float*>(out), broken);
    bool right = true;
    for (int i = 0; i < kBlocks * kThreads; ++i)
        right = right && static_cast<float*>(out)[i] == float(1000 * (i / kThreads) + i % kThreads);
    free(out);
    return right;
}

}  // namespace
}  // namespace selfcheck
