// A failed CUDA call as an exception that names it.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace peftk::cuda {

inline void check(cudaError_t status, const char* call) {
    if (status == cudaSuccess) return;
    cudaGetLastError();  // or the next call would report this failure again
    throw std::runtime_error(std::string(call) + ": " + cudaGetErrorName(status) + ": " + cudaGetErrorString(status));
}

}  // namespace peftk::cuda
