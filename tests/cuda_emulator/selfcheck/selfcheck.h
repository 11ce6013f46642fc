// Checks of the executor: small kernels, each correct, or broken in one way by its parameter `broken`. main.cpp runs
// one of them; tests/kernels/cuda/test_cuda_on_host.py says how each must end under each sanitizer.
#pragma once

#include <cuda_runtime.h>

#include <memory>

#include "cuda/instructions.cuh"

namespace selfcheck {

// Returns whether the results are right. Reports end the process.
using Check = bool (*)(bool broken);

struct Registered {
    const char* name;
    Check check;
    Registered* next;
    static Registered*& first() {
        static Registered* first = nullptr;
        return first;
    }
    Registered(const char* name, Check check) : name(name), check(check), next(first()) { first() = this; }
};

#define SELFCHECK(name)                                     \
    bool name(bool broken);                                 \
    ::selfcheck::Registered name##_registered(#name, name); \
    bool name([[maybe_unused]] bool broken)

// A heap block of exactly `count` elements.
template <class T>
std::unique_ptr<T[]> numbers(size_t count, T first, T step) {
    std::unique_ptr<T[]> values(new T[count]);
    for (size_t i = 0; i < count; ++i) values[i] = T(first + T(i) * step);
    return values;
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), unsigned grid, unsigned threads, size_t shared_bytes,
            Arguments... arguments) {
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(grid);
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
    if (error != cudaSuccess) cuda_on_host::fail("launch: %s", cudaGetErrorName(error));
}

}  // namespace selfcheck
