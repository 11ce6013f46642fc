// The result of a launcher: success, a CUDA error, or a call that no kernel supports.
#pragma once

#include <cuda_runtime.h>

namespace peftk::cuda {

// Why no kernel supports a call. A launcher that returns one of these has launched nothing.
enum class Unsupported : int { kNothing = 0, kDtype, kM, kK, kAlignment, kAdapters, kRows, kSize };

inline const char* describe(Unsupported code) {
    switch (code) {
        case Unsupported::kNothing: return "nothing";
        case Unsupported::kDtype: return "dtype: expected a combination that a kernel is built for";
        case Unsupported::kM: return "M: expected 1 ... 64 rows";
        case Unsupported::kK: return "K: expected a multiple of 8";
        case Unsupported::kAlignment: return "x, weight: expected rows that start at multiples of 16 bytes";
        case Unsupported::kAdapters: return "adapters: expected at most 2^20";
        case Unsupported::kRows: return "ids: expected fewer than 2^31 - 1024 rows";
        case Unsupported::kSize: return "size: expected a grid of at most 2^31 - 1 blocks";
    }
    return "unknown code";
}

struct Status {
    cudaError_t error = cudaSuccess;
    Unsupported unsupported = Unsupported::kNothing;

    Status(cudaError_t error) : error(error) {}
    Status(Unsupported code) : unsupported(code) {}
    bool ok() const { return error == cudaSuccess && unsupported == Unsupported::kNothing; }
};

// Makes a device the current one of this thread for a scope, and restores the previous one.
class DeviceGuard {
public:
    explicit DeviceGuard(int device) {
        status_ = cudaGetDevice(&before_);
        if (status_ == cudaSuccess && before_ != device) status_ = cudaSetDevice(device);
    }
    ~DeviceGuard() {
        if (status_ == cudaSuccess) cudaSetDevice(before_);
    }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;
    cudaError_t status() const { return status_; }

private:
    cudaError_t status_;
    int before_ = 0;
};

}  // namespace peftk::cuda
