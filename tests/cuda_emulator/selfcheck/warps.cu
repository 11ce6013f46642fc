// Warp instructions: the value of each lane, following the CUDA programming guide, and lanes that do not arrive.
#include "selfcheck.h"

namespace selfcheck {
namespace {

constexpr unsigned kAll = ~0u;

// Kernels of one warp: out[lane] must equal `expected`.
template <class Kernel, class Expected>
bool warp(Kernel kernel, bool broken, Expected expected) {
    auto out = numbers<int>(32, -1, 0);
    launch(kernel, 1, 32, 0, out.get(), broken);
    for (int lane = 0; lane < 32; ++lane)
        if (out[lane] != expected(lane)) return false;
    return true;
}

__global__ void sum(int* out, bool broken) {
    int total = int(threadIdx.x);
    for (int step = 16; step; step /= 2) {
        if (broken && threadIdx.x == 5) break;
        total += __shfl_xor_sync(kAll, total, step);
    }
    out[threadIdx.x] = total;
}
SELFCHECK(shuffle_with_a_lane_missing) {
    return warp(sum, broken, [](int) { return 31 * 16; });
}

__global__ void half(int* out, bool broken) {
    const unsigned mask = broken ? 0xff00u : 0xffffu;
    int value = -2;
    if (threadIdx.x < 16) value = __shfl_xor_sync(mask, int(threadIdx.x), 1);
    out[threadIdx.x] = value;
}
SELFCHECK(mask_without_the_lane) {
    return warp(half, broken, [](int lane) { return lane < 16 ? lane ^ 1 : -2; });
}

__global__ void unnamed_source(int* out, bool broken) {
    int value = -2;
    if (threadIdx.x < 16) value = __shfl_sync(0xffffu, int(threadIdx.x), broken ? 16 : 15);
    out[threadIdx.x] = value;
}
SELFCHECK(shuffle_from_a_lane_outside_the_mask) {
    return warp(unnamed_source, broken, [](int lane) { return lane < 16 ? 15 : -2; });
}

__global__ void two_instructions(int* out, bool broken) {
    if (broken && threadIdx.x < 7) {
        out[threadIdx.x] = __shfl_sync(kAll, int(threadIdx.x), 3);
    } else {
        out[threadIdx.x] = __shfl_sync(kAll, int(threadIdx.x), 3);
    }
}
SELFCHECK(two_different_shuffles) {
    return warp(two_instructions, broken, [](int) { return 3; });
}

// Two halves of a warp at different instructions at the same time, which their masks allow.
__global__ void apart(int* out, bool) {
    const int lane = int(threadIdx.x);
    if (lane < 16) {
        for (int i = 0; i < 3; ++i) out[lane] = __shfl_sync(0x0000ffffu, lane, 1);
    } else {
        out[lane] = __shfl_sync(0xffff0000u, lane, 17);
    }
    __syncwarp();
}
SELFCHECK(halves_of_a_warp) {
    return warp(apart, broken, [](int lane) { return lane < 16 ? 1 : 17; });
}

// All kinds of shuffles, all widths, all distances.
__global__ void shuffles(int* out, bool) {
    const int lane = int(threadIdx.x);
    for (int width = 1; width <= 32; width *= 2) {
        const int first = lane / width * width;
        for (int by = 0; by < 32; ++by) {
            const int up = __shfl_up_sync(kAll, lane, unsigned(by), width);
            const int down = __shfl_down_sync(kAll, lane, unsigned(by), width);
            const int other = __shfl_xor_sync(kAll, lane, by, width);
            const int given = __shfl_sync(kAll, lane, by, width);
            bool right = up == (lane - by >= first ? lane - by : lane);
            right = right && down == (lane + by < first + width ? lane + by : lane);
            right = right && other == ((lane ^ by) < first + width ? lane ^ by : lane);
            right = right && given == first + by % width;
            if (!right) out[lane] = 1000 * width + by;
        }
    }
    const double wide = __shfl_xor_sync(kAll, 0.1 * lane, 1);
    if (wide != 0.1 * (lane ^ 1)) out[lane] = -2;
}
SELFCHECK(all_shuffles) {
    return warp(shuffles, broken, [](int) { return -1; });
}

__global__ void votes(int* out, bool) {
    const int lane = int(threadIdx.x);
    bool right = __ballot_sync(kAll, lane % 3 == 0) == 0x49249249u;
    right = right && !__all_sync(kAll, lane != 9) && __all_sync(kAll, lane < 32);
    right = right && __any_sync(kAll, lane == 9) && !__any_sync(kAll, lane > 31);
    unsigned equal = 0;
    for (int other = 0; other < 32; ++other) equal |= unsigned(other % 5 == lane % 5) << other;
    right = right && __match_any_sync(kAll, lane % 5) == equal;
    right = right && __popc(0xf0f0u) == 8 && __ffs(0x50) == 5 && __ffs(0) == 0 && __clz(1) == 31 && __clz(0) == 32;
    out[lane] = right;
}
SELFCHECK(all_votes) {
    return warp(votes, broken, [](int) { return 1; });
}

}  // namespace
}  // namespace selfcheck
