// CUDA for the host: with this directory before csrc on the include path, a .cu file compiles with any g++ and runs
// under its sanitizers. Every CUDA thread is a fiber. docs/cuda_on_host.md says what is modelled and what is not.
//
//   1. Kernels take their shared memory from peftk::cuda::shared_memory<Layout>(); there is no static __shared__.
//   2. From Python: tests/kernels/cuda/on_host/<stem>.py, where peftk._cuda is the module for the host, run by
//      tests/support/host_cuda.py's `run`. `mutant_failure` does the same with a mutant of a .cu file, and says how
//      it failed.
//   3. From C++: link executor.cpp, warp.cpp and tensor_cores.cpp, all three compiled without sanitizers, with
//      -DCUDA_ON_HOST_ASAN or -DCUDA_ON_HOST_TSAN for what watches the kernels; compile these with that sanitizer.
//   4. cuda_on_host_seed(n) draws another schedule; cuda_on_host::statistics counts launches and bank conflicts.
//   5. What CUDA has and these headers lack is added here when a kernel needs it, as CUDA's manuals describe it.
#pragma once

#define PEFTK_CUDA_ON_HOST 1

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <tuple>
#include <utility>
#include <vector>

#include "atomics.h"
#include "executor.h"
#include "types.h"
#include "warp.h"

// ---- The language

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)

using std::max;
using std::min;

// ---- Intrinsics

// Compile with -ffp-contract=off: each of these is one rounding.
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }

inline unsigned __float_as_uint(float value) { return cuda_on_host::from_bits<unsigned>(cuda_on_host::to_bits(value)); }
inline float __uint_as_float(unsigned bits) { return cuda_on_host::from_bits<float>(cuda_on_host::to_bits(bits)); }
inline int __float_as_int(float value) { return int(__float_as_uint(value)); }
inline float __int_as_float(int bits) { return __uint_as_float(unsigned(bits)); }

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __clz(int bits) { return bits ? __builtin_clz(unsigned(bits)) : 32; }

// Loads and stores with a cache hint, which is ignored.
template <class T>
T __ldg(const T* from) {
    return *from;
}
template <class T>
T __ldcs(const T* from) {
    return *from;
}
template <class T>
void __stcs(T* to, T value) {
    *to = value;
}

// ---- The runtime: one device, number 0. Kernels have run when their launch returns.

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorInvalidDevice = 101,
};
typedef struct CUstream_st* cudaStream_t;

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes = 0;
    cudaStream_t stream = nullptr;
};

namespace cuda_on_host {

constexpr size_t kSharedBytes = 48 << 10;       // per block, unless the kernel's attribute allows more
constexpr size_t kSharedBytesMost = 227 << 10;  // as on sm_90 and sm_100; sm_86 and sm_120 have 99 KiB, sm_80 has 163
inline cudaError_t last_error = cudaSuccess;

inline cudaError_t answer(cudaError_t error) {
    if (error != cudaSuccess) last_error = error;
    return error;
}

// The dynamic shared memory that a kernel's attribute allows.
template <class Kernel>
size_t& allowed_shared_bytes(Kernel* kernel) {
    static std::vector<std::pair<Kernel*, size_t>> kernels;
    for (auto& [known, bytes] : kernels)
        if (known == kernel) return bytes;
    return kernels.emplace_back(kernel, kSharedBytes).second;
}

template <class... Parameters, class... Arguments>
cudaError_t launch(const char* text, const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                   Arguments&&... arguments) {
    const dim3 grid = config->gridDim, threads = config->blockDim;
    const bool grid_fits =
        grid.x >= 1 && grid.x <= 0x7fffffff && grid.y >= 1 && grid.y <= 65535 && grid.z >= 1 && grid.z <= 65535;
    const uint64_t count = uint64_t(threads.x) * threads.y * threads.z;
    if (!grid_fits || count < 1 || count > 1024) return answer(cudaErrorInvalidConfiguration);
    if (config->dynamicSmemBytes > allowed_shared_bytes(kernel)) return answer(cudaErrorInvalidValue);
    struct Call {
        void (*kernel)(Parameters...);
        std::tuple<Parameters...> arguments;
    } const call{kernel, {arguments...}};
    const auto run = [](const void* call) {
        std::apply(static_cast<const Call*>(call)->kernel, static_cast<const Call*>(call)->arguments);
    };
    run_grid(text, grid, threads, config->dynamicSmemBytes, run, &call);
    return cudaSuccess;
}

}  // namespace cuda_on_host

// The kernel and its arguments as they are written name the launch in reports.
#define cudaLaunchKernelEx(config, ...) cuda_on_host::launch(#__VA_ARGS__, config, __VA_ARGS__)

template <class... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute, int value) {
    if (value < 0 || size_t(value) > cuda_on_host::kSharedBytesMost) return cuda_on_host::answer(cudaErrorInvalidValue);
    cuda_on_host::allowed_shared_bytes(kernel) = std::max(size_t(value), cuda_on_host::kSharedBytes);
    return cudaSuccess;
}

inline cudaError_t cudaGetDevice(int* device) {
    *device = cuda_on_host::current_device;
    return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
    if (device < 0 || device >= cuda_on_host::kDevices) return cuda_on_host::answer(cudaErrorInvalidDevice);
    cuda_on_host::current_device = device;
    return cudaSuccess;
}

inline cudaError_t cudaGetLastError() { return std::exchange(cuda_on_host::last_error, cudaSuccess); }

inline const char* cudaGetErrorName(cudaError_t error) {
    switch (error) {
        case cudaSuccess: return "cudaSuccess";
        case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
        case cudaErrorInvalidConfiguration: return "cudaErrorInvalidConfiguration";
        case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
    }
    return "an error code that the host's runtime does not have";
}
inline const char* cudaGetErrorString(cudaError_t error) {
    switch (error) {
        case cudaSuccess: return "no error";
        case cudaErrorInvalidValue: return "invalid argument";
        case cudaErrorInvalidConfiguration: return "invalid configuration argument";
        case cudaErrorInvalidDevice: return "invalid device ordinal";
    }
    return "unknown error";
}
