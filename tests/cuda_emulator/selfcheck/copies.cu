// Asynchronous copies: from issue to wait no thread may access the destination.
#include "selfcheck.h"

namespace selfcheck {
namespace {

constexpr int kThreads = 64, kStages = 2, kSteps = 6;

struct Shared {
    alignas(16) float stage[kStages][kThreads][4];
};

using peftk::cuda::copy_async_16;
using peftk::cuda::copy_async_commit;
using peftk::cuda::copy_async_wait;
using peftk::cuda::shared_memory;

struct Aligned {
    float* data;
    explicit Aligned(size_t count) {
        void* block;
        if (posix_memalign(&block, 16, count * sizeof(float))) abort();
        data = static_cast<float*>(block);
        for (size_t i = 0; i < count; ++i) data[i] = float(i);
    }
    ~Aligned() { free(data); }
    Aligned(const Aligned&) = delete;
};

// out[i] = in[i]. Each thread copies four elements, and reads those of the thread `apart` from it.
template <class Kernel>
bool copies(Kernel kernel, bool broken, int count = kThreads * 4) {
    const Aligned in(count);
    auto out = numbers<float>(kThreads * 4, -1, 0);
    launch(kernel, 1, kThreads, sizeof(Shared), in.data, count, out.get(), broken);
    for (int i = 0; i < kThreads * 4; ++i)
        if (out[i] != (i < count ? float(i) : 0.0f)) return false;
    return true;
}

__device__ void write(float* out, int thread, const float (&four)[4]) {
    for (int i = 0; i < 4; ++i) out[4 * thread + i] = four[i];
}

__global__ void own(const float* in, int, float* out, bool broken) {
    auto& stage = shared_memory<Shared>().stage[0];
    const int t = threadIdx.x;
    copy_async_16(stage[t], in + 4 * t, 16);
    copy_async_commit();
    if (!broken) copy_async_wait<0>();
    write(out, t, stage[t]);
    copy_async_wait<0>();
}
SELFCHECK(read_before_the_wait) { return copies(own, broken); }

__global__ void overwrite(const float* in, int, float* out, bool broken) {
    auto& stage = shared_memory<Shared>().stage[0];
    const int t = threadIdx.x;
    copy_async_16(stage[t], in + 4 * t, 16);
    copy_async_commit();
    if (broken) stage[t][1] = 5.0f;
    copy_async_wait<0>();
    write(out, t, stage[t]);
}
SELFCHECK(write_before_the_wait) { return copies(overwrite, broken); }

__global__ void never(const float* in, int, float* out, bool broken) {
    auto& stage = shared_memory<Shared>().stage[0];
    const int t = threadIdx.x;
    for (int i = 0; i < 4; ++i) out[4 * t + i] = in[4 * t + i];
    copy_async_16(stage[t], in + 4 * t, 16);
    copy_async_commit();
    if (!broken) copy_async_wait<0>();
}
SELFCHECK(copy_under_way_at_return) { return copies(never, broken); }

__global__ void uncommitted(const float* in, int, float* out, bool broken) {
    auto& stage = shared_memory<Shared>().stage[0];
    const int t = threadIdx.x;
    copy_async_16(stage[t], in + 4 * t, 16);
    if (!broken) copy_async_commit();
    copy_async_wait<0>();
    write(out, t, stage[t]);
}
SELFCHECK(copy_without_a_commit) { return copies(uncommitted, broken); }

__global__ void too_few(const float* in, int, float* out, bool broken) {
    auto& stage = shared_memory<Shared>().stage;
    const int t = threadIdx.x;
    copy_async_16(stage[0][t], in + 4 * t, 16);
    copy_async_commit();
    copy_async_16(stage[1][t], in + 4 * t, 16);
    copy_async_commit();
    if (broken) {
        copy_async_wait<1>();
    } else {
        copy_async_wait<0>();
    }
    write(out, t, stage[1][t]);
    copy_async_wait<0>();
}
SELFCHECK(wait_for_a_group_too_few) { return copies(too_few, broken); }

// A wait makes copies visible only to its own thread.
__global__ void others(const float* in, int, float* out, bool broken) {
    auto& stage = shared_memory<Shared>().stage[0];
    const int t = threadIdx.x;
    copy_async_16(stage[t], in + 4 * t, 16);
    copy_async_commit();
    copy_async_wait<0>();
    if (!broken) __syncthreads();
    write(out, t ^ 32, stage[t ^ 32]);
}
SELFCHECK(no_barrier_after_the_wait) { return copies(others, broken); }

// A barrier before the wait does not order the copies of other threads.
__global__ void too_early(const float* in, int, float* out, bool broken) {
    auto& stage = shared_memory<Shared>().stage[0];
    const int t = threadIdx.x;
    copy_async_16(stage[t], in + 4 * t, 16);
    copy_async_commit();
    if (broken) __syncthreads();
    copy_async_wait<0>();
    if (!broken) __syncthreads();
    write(out, t ^ 32, stage[t ^ 32]);
}
SELFCHECK(barrier_before_the_wait) { return copies(too_early, broken); }

__global__ void zeros(const float* in, int count, float* out, bool broken) {
    auto& stage = shared_memory<Shared>().stage[0];
    const int t = threadIdx.x;
    const int valid = min(4, max(0, count - 4 * t));
    copy_async_16(stage[t], in + 4 * t, broken ? 16 : 4 * valid);
    copy_async_commit();
    copy_async_wait<0>();
    write(out, t, stage[t]);
}
SELFCHECK(source_past_its_end) { return copies(zeros, broken, 4 * (kThreads - 1) + 3); }

__global__ void skewed(const float* in, int, float* out, bool broken) {
    auto& stage = shared_memory<Shared>().stage[0];
    const int t = threadIdx.x;
    copy_async_16(&stage[t][broken ? 1 : 0], in + 4 * t, 16);
    copy_async_commit();
    copy_async_wait<0>();
    write(out, t, stage[t]);
}
SELFCHECK(misaligned_destination) { return copies(skewed, broken); }

__global__ void elsewhere(const float* in, int, float* out, bool broken) {
    alignas(16) float local[4];
    auto& stage = shared_memory<Shared>().stage[0];
    const int t = threadIdx.x;
    float* to = broken ? local : stage[t];
    copy_async_16(to, in + 4 * t, 16);
    copy_async_commit();
    copy_async_wait<0>();
    for (int i = 0; i < 4; ++i) out[4 * t + i] = to[i];
}
SELFCHECK(destination_not_shared) { return copies(elsewhere, broken); }

__global__ void same_place(const float* in, int, float* out, bool broken) {
    auto& stage = shared_memory<Shared>().stage[0];
    const int t = threadIdx.x;
    copy_async_16(stage[broken ? t / 2 : t], in + 4 * t, 16);
    copy_async_commit();
    copy_async_wait<0>();
    write(out, t, stage[t]);
}
SELFCHECK(two_copies_to_one_place) { return copies(same_place, broken); }

// A pipeline of two stages: sums, over the steps, what the other warp has copied.
__global__ void pipeline(const float* in, float* out, bool broken) {
    auto& stage = shared_memory<Shared>().stage;
    const int t = threadIdx.x;
    const auto issue = [&](int step) {
        if (step < kSteps) copy_async_16(stage[step % kStages][t], in + 4 * (step * kThreads + t), 16);
        copy_async_commit();
    };
    issue(0);
    float sum[4] = {};
    for (int step = 0; step < kSteps; ++step) {
        issue(step + 1);
        copy_async_wait<1>();
        __syncthreads();
        for (int i = 0; i < 4; ++i) sum[i] += stage[step % kStages][t ^ 32][i];
        if (!broken) __syncthreads();  // otherwise the next issue overwrites what others still read
    }
    write(out, t ^ 32, sum);
}
SELFCHECK(stage_overwritten_while_it_is_read) {
    const Aligned in(kSteps * kThreads * 4);
    auto out = numbers<float>(kThreads * 4, -1, 0);
    launch(pipeline, 1, kThreads, sizeof(Shared), in.data, out.get(), broken);
    for (int i = 0; i < kThreads * 4; ++i)
        if (out[i] != float(kSteps * i + kThreads * 4 * kSteps * (kSteps - 1) / 2)) return false;
    return true;
}

}  // namespace
}  // namespace selfcheck
