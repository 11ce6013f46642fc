// Atomics and fences. Before and after each of them another thread may run.
//
// The race detector sees each with its memory order. CUDA's own atomics are relaxed and order nothing.
#pragma once

#include <cstring>

#include "executor.h"

namespace cuda_on_host {

// One atomic step: stores update(before) and returns the previous value. A step that changes nothing is no progress.
template <class T, class Update>
T modify(T* address, int order, Update update) {
    before_atomic(address);
    T before = __atomic_load_n(address, __ATOMIC_RELAXED), after;
    do {
        after = update(before);
    } while (!__atomic_compare_exchange_n(address, &before, after, false, order, __ATOMIC_RELAXED));
    after_atomic(address, after != before);
    return before;
}

template <class T>
T load(const T* address, int order) {
    yield();
    const T value = __atomic_load_n(address, order);
    after_atomic(const_cast<T*>(address), false);
    return value;
}

}  // namespace cuda_on_host

template <class T>
T atomicAdd(T* address, T value) {
    return cuda_on_host::modify(address, __ATOMIC_RELAXED, [=](T before) { return T(before + value); });
}

template <class T>
T atomicMax(T* address, T value) {
    return cuda_on_host::modify(address, __ATOMIC_RELAXED, [=](T before) { return before < value ? value : before; });
}

template <class T>
T atomicMin(T* address, T value) {
    return cuda_on_host::modify(address, __ATOMIC_RELAXED, [=](T before) { return value < before ? value : before; });
}

template <class T>
T atomicOr(T* address, T value) {
    return cuda_on_host::modify(address, __ATOMIC_RELAXED, [=](T before) { return T(before | value); });
}

template <class T>
T atomicExch(T* address, T value) {
    return cuda_on_host::modify(address, __ATOMIC_RELAXED, [=](T) { return value; });
}

template <class T>
T atomicCAS(T* address, T compare, T value) {
    return cuda_on_host::modify(address, __ATOMIC_RELAXED,
                                [=](T before) { return before == compare ? value : before; });
}

inline void __threadfence() { cuda_on_host::fence(); }
inline void __threadfence_block() { cuda_on_host::fence(); }
