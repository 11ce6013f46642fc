// csrc/cuda/instructions.cuh in plain C++: the same functions, which do what the PTX manual says of their instructions
// and report what it leaves undefined. Their per-lane code is compiled into the kernel, with its sanitizers.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size)
#define ASAN_UNPOISON_MEMORY_REGION(address, size)
#endif

namespace peftk::cuda {

using cuda_on_host::Site;

// ---- Shared memory: a heap block per block, of the size of the launch, filled with NaN.

template <typename Layout>
inline Layout& shared_memory() {
    return *reinterpret_cast<Layout*>(cuda_on_host::shared_memory(sizeof(Layout), alignof(Layout)));
}

// ---- Copies. From issue to wait the destination contains NaN, and the address sanitizer reports any access to it. The
// source is read at issue or at the wait, at random.

inline void copy_async_16(void* to_shared, const void* from_global, int bytes,
                          Site site = {__builtin_FILE(), __builtin_LINE()}) {
    cuda_on_host::Copy& copy = cuda_on_host::issue_copy(site, to_shared, from_global, bytes);
    if (copy.captured) {
        char data[16];
        memcpy(data, from_global, size_t(bytes));
        cuda_on_host::capture(copy, data);
    }
    memset(copy.to, 0xff, 16);
    ASAN_POISON_MEMORY_REGION(copy.to, 16);
}

inline void copy_async_commit() { cuda_on_host::commit_copies(); }

template <int kPending>
inline void copy_async_wait() {
    cuda_on_host::yield();
    size_t count;
    const cuda_on_host::Copy* copy = cuda_on_host::due_copies(kPending, count);
    for (size_t i = 0; i < count; ++i, ++copy) {
        ASAN_UNPOISON_MEMORY_REGION(copy->to, 16);
        memset(copy->to, 0, 16);
        memcpy(copy->to, copy->captured ? copy->data : copy->from, size_t(copy->bytes));
    }
    cuda_on_host::forget_copies(count);
}

// ---- Tensor cores

inline void load_matrices(uint32_t (&to)[4], const void* shared_row, Site site = {__builtin_FILE(), __builtin_LINE()}) {
    const void* rows[32];
    cuda_on_host::exchange_rows(site, shared_row, rows);
    const unsigned g = cuda_on_host::lane() / 4, t = cuda_on_host::lane() % 4;
    for (unsigned i = 0; i < 4; ++i) to[i] = static_cast<const uint32_t*>(rows[8 * i + g])[t];
}

inline void multiply_bf16(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                          Site site = {__builtin_FILE(), __builtin_LINE()}) {
    cuda_on_host::multiply(site, sum, a, b, true);
}

inline void multiply_f16(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                         Site site = {__builtin_FILE(), __builtin_LINE()}) {
    cuda_on_host::multiply(site, sum, a, b, false);
}

// ---- Atomics

inline int add_relaxed(int* counter, int value) {
    return cuda_on_host::modify(counter, __ATOMIC_RELAXED, [=](int before) { return before + value; });
}
inline int add_release(int* counter, int value) {
    return cuda_on_host::modify(counter, __ATOMIC_RELEASE, [=](int before) { return before + value; });
}
inline int add_acq_rel(int* counter, int value) {
    return cuda_on_host::modify(counter, __ATOMIC_ACQ_REL, [=](int before) { return before + value; });
}
inline int load_acquire(const int* counter) { return cuda_on_host::load(counter, __ATOMIC_ACQUIRE); }

}  // namespace peftk::cuda
