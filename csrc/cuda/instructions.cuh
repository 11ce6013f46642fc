// GPU instructions that CUDA C++ has no name for: each function is one PTX instruction. Shared memory is addressed by
// ordinary pointers.
//
// tests/cuda_emulator/cuda/instructions.cuh defines the same functions in plain C++, as the PTX manual describes them.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace peftk::cuda {

// ---- Shared memory: a kernel's layout is one struct, whose size its launcher passes.

template <typename Layout>
__device__ inline Layout& shared_memory() {
    extern __shared__ __align__(128) unsigned char bytes[];
    return *reinterpret_cast<Layout*>(bytes);
}

__device__ inline uint32_t shared_address(const void* shared) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// ---- Asynchronous copies from global to shared memory (sm_80). They are visible to the thread that issued them after
// a wait, and to the others after a barrier that follows it. Until the wait, no thread may access the destination.

// Copies the first `bytes` (0 … 16) of 16, bypassing L1, and zeros for the others. Both addresses are multiples of 16.
__device__ inline void copy_async_16(void* to_shared, const void* from_global, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to_shared)), "l"(from_global),
                 "r"(bytes)
                 : "memory");
}

// Closes a group: the copies that this thread has issued since its last group. A group may be empty.
__device__ inline void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kPending of this thread's newest groups are in flight.
template <int kPending>
__device__ inline void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- Tensor cores. g = lane / 4, t = lane % 4.

// Four 8 x 8 matrices of 16-bit values; lanes 8i … 8i + 7 give the addresses of matrix i's rows (16 bytes each,
// multiples of 16). to[i] holds row g, columns 2t and 2t + 1 of matrix i, the lower column in the lower half.
__device__ inline void load_matrices(uint32_t (&to)[4], const void* shared_row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(shared_row))
                 : "memory");
}

// sum [16, 8] += a [16, 16] · b [16, 8], products exact, sums in fp32. Two values of 16 bits in a word, the one with
// the lower k in the lower half:
//     a[0] row g, k = 2t    a[1] row g + 8, k = 2t    a[2] row g, k = 2t + 8    a[3] row g + 8, k = 2t + 8
//     b[0] k = 2t, column g    b[1] k = 2t + 8, column g
//     sum[0], sum[1] row g, columns 2t and 2t + 1    sum[2], sum[3] row g + 8, the same
__device__ inline void multiply_bf16(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ inline void multiply_f16(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// ---- Atomics between the blocks of a device. They return the previous value.

__device__ inline int add_relaxed(int* counter, int value) {
    int before;
    asm volatile("atom.add.relaxed.gpu.global.s32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(value) : "memory");
    return before;
}

__device__ inline int add_release(int* counter, int value) {
    int before;
    asm volatile("atom.add.release.gpu.global.s32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(value) : "memory");
    return before;
}

__device__ inline int add_acq_rel(int* counter, int value) {
    int before;
    asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(value) : "memory");
    return before;
}

__device__ inline int load_acquire(const int* counter) {
    int value;
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
    return value;
}

}  // namespace peftk::cuda
