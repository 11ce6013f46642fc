// A launcher's Status as a Python exception.
#pragma once

#include <stdexcept>
#include <string>

#include "cuda/status.h"

namespace peftk::cuda {

// Throws ValueError for a call that no kernel supports, RuntimeError for a launch that CUDA refused.
inline void check(const Status& status, const char* call) {
    if (status.ok()) return;
    if (status.unsupported != Unsupported::kNothing)
        throw std::invalid_argument(std::string(call) + ": " + describe(status.unsupported));
    cudaGetLastError();  // otherwise the next call would report this failure again
    throw std::runtime_error(std::string(call) + ": " + cudaGetErrorName(status.error) + ": " +
                             cudaGetErrorString(status.error));
}

}  // namespace peftk::cuda
