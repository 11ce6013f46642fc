// The notions of CUDA that peftk's kernels use, as plain C++: a .cu file includes this in place of CUDA's own
// <cuda_runtime.h>, compiles with any g++ and runs on the host, under its sanitizers.
//
// A thread of a block is a fiber. Fibers run one at a time, each until its next barrier, in an order that is drawn anew
// for every barrier; blocks run one after another, in an order that is drawn too. So a missing __syncthreads() shows:
// a thread gets far ahead of others, reads what they haven't written yet and overwrites what they have yet to read.
// What has not been written is poison: shared memory is filled with NaNs before each block.
//
// Stricter than the hardware: all threads must reach the same barrier, by line, and none may return before it.
#pragma once

#include <link.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

// ---- The language
// ----------------------------------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
// Of a program's thread-local variables there are no others, so the executor can poison the shared ones without knowing
// their names: they are the program's thread-local storage. (A section of their own would do too, but g++ 12 ignores
// the attribute in templates.)
#define __shared__ static thread_local
#define __syncthreads() cuda_on_host::barrier(__LINE__)

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
// Aligned as on the device, so that the undefined-behaviour sanitizer sees a misaligned 128-bit access.
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(16) float4 {
    float x, y, z, w;
};

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

using std::max;
using std::min;

// ---- Intrinsics
// ------------------------------------------------------------------------------------------------------

// Compile with -ffp-contract=off: each of these is one rounding.
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }

inline unsigned __float_as_uint(float value) {
    unsigned bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}
inline float __uint_as_float(unsigned bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

// Loads and stores with a cache hint.
template <class T>
T __ldcs(const T* from) {
    return *from;
}
template <class T>
void __stcs(T* to, T value) {
    *to = value;
}

// ---- The executor
// ----------------------------------------------------------------------------------------------------

namespace cuda_on_host {

inline std::mt19937 order(1);  // of blocks and threads; a test seeds it

[[noreturn]] inline void fail(const char* what) {
    fprintf(stderr, "cuda_on_host: %s\n", what);
    abort();
}

struct Fiber {
    static constexpr size_t kStack = 1 << 18;
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[kStack]};
    void* fake_stack = nullptr;  // the address sanitizer's, while the fiber does not run
    uint3 index;
    int line = 0;  // of the barrier that it waits at
    bool finished = false;
};

struct Block {
    std::vector<std::unique_ptr<Fiber>> fibers;
    Fiber* running = nullptr;
    ucontext_t scheduler;
    const void* scheduler_stack = nullptr;
    size_t scheduler_stack_size = 0;
    std::function<void()> kernel;
};
inline Block block;

// The address sanitizer wants to know of every change of stacks: `leave` before one, `arrive` after it.
inline void leave(void** fake_stack, const void* to, size_t size) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(fake_stack, to, size);
#else
    (void)fake_stack, (void)to, (void)size;
#endif
}
inline void arrive(void* fake_stack, const void** from, size_t* size) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_stack, from, size);
#else
    (void)fake_stack, (void)from, (void)size;
#endif
}

inline void fiber_main() {
    arrive(nullptr, &block.scheduler_stack, &block.scheduler_stack_size);
    block.kernel();
    block.running->finished = true;
    leave(nullptr, block.scheduler_stack, block.scheduler_stack_size);
    setcontext(&block.scheduler);
}

// Back to the scheduler until it resumes this fiber.
inline void yield() {
    Fiber& fiber = *block.running;
    leave(&fiber.fake_stack, block.scheduler_stack, block.scheduler_stack_size);
    swapcontext(&fiber.context, &block.scheduler);
    arrive(fiber.fake_stack, &block.scheduler_stack, &block.scheduler_stack_size);
}

inline void resume(Fiber& fiber) {
    block.running = &fiber;
    threadIdx = fiber.index;
    void* fake_stack = nullptr;
    leave(&fake_stack, fiber.stack.get(), Fiber::kStack);
    swapcontext(&block.scheduler, &fiber.context);
    arrive(fake_stack, nullptr, nullptr);
}

inline void barrier(int line) {
    block.running->line = line;
    yield();
}

// Fills this thread's copy of the program's thread-local storage; the libraries that come after it keep theirs.
inline void poison_shared_memory() {
    const auto fill = [](dl_phdr_info* program, size_t, void*) {
        for (int i = 0; i < program->dlpi_phnum; ++i) {
            const auto& segment = program->dlpi_phdr[i];
            if (segment.p_type == PT_TLS && program->dlpi_tls_data)
                memset(program->dlpi_tls_data, 0xff, segment.p_memsz);
        }
        return 1;  // the program is the first of the list
    };
    dl_iterate_phdr(fill, nullptr);
}

inline void run_block() {
    poison_shared_memory();
    unsigned number = 0;
    for (auto& fiber : block.fibers) {
        const unsigned row = number / blockDim.x;
        fiber->index = {number % blockDim.x, row % blockDim.y, row / blockDim.y};
        fiber->finished = false;
        getcontext(&fiber->context);
        fiber->context.uc_stack.ss_sp = fiber->stack.get();
        fiber->context.uc_stack.ss_size = Fiber::kStack;
        fiber->context.uc_link = nullptr;
        makecontext(&fiber->context, fiber_main, 0);
        ++number;
    }
    std::vector<Fiber*> turn;
    for (auto& fiber : block.fibers) turn.push_back(fiber.get());
    while (true) {
        std::shuffle(turn.begin(), turn.end(), order);
        for (Fiber* fiber : turn) resume(*fiber);
        const Fiber& first = *turn[0];
        for (const Fiber* fiber : turn) {
            if (fiber->finished != first.finished) fail("a thread returned while others wait at a barrier");
            if (!fiber->finished && fiber->line != first.line) fail("threads wait at different barriers");
        }
        if (first.finished) return;
    }
}

inline void run_grid(dim3 grid, dim3 threads, std::function<void()> kernel) {
    gridDim = grid;
    blockDim = threads;
    block.kernel = std::move(kernel);
    while (block.fibers.size() > threads.x * threads.y * threads.z) block.fibers.pop_back();
    while (block.fibers.size() < threads.x * threads.y * threads.z) block.fibers.emplace_back(new Fiber);
    std::vector<uint64_t> blocks(uint64_t(grid.x) * grid.y * grid.z);
    std::iota(blocks.begin(), blocks.end(), 0);
    std::shuffle(blocks.begin(), blocks.end(), order);
    for (const uint64_t number : blocks) {
        const uint64_t row = number / grid.x;
        blockIdx = {unsigned(number % grid.x), unsigned(row % grid.y), unsigned(row / grid.y)};
        run_block();
    }
}

}  // namespace cuda_on_host

// ---- The runtime
// -----------------------------------------------------------------------------------------------------

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
typedef struct CUstream_st* cudaStream_t;

struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes = 0;
    cudaStream_t stream = nullptr;
};

// Runs the whole grid before it returns.
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
    const dim3 grid = config->gridDim, threads = config->blockDim;
    const bool grid_fits =
        grid.x >= 1 && grid.x <= 0x7fffffff && grid.y >= 1 && grid.y <= 65535 && grid.z >= 1 && grid.z <= 65535;
    const uint64_t count = uint64_t(threads.x) * threads.y * threads.z;
    if (!grid_fits || count < 1 || count > 1024) return cudaErrorInvalidConfiguration;
    cuda_on_host::run_grid(grid, threads, [&] { kernel(arguments...); });
    return cudaSuccess;
}
