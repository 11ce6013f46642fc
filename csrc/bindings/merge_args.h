// What the merges of peftk._cpu and peftk._cuda share: adapters as Python passes them, addresses and dtype codes.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "common/merge.h"

namespace peftk {

inline Dtype dtype_of(const char* name, int code) {
    if (code < kFloat32 || code > kFloat16) {
        throw std::invalid_argument(std::string(name) + ": expected a dtype code 0, 1 or 2, got " +
                                    std::to_string(code));
    }
    return Dtype(code);
}

inline MergeFactors merge_factors(uintptr_t lora_A, uintptr_t lora_B, const int64_t* ends, const float* scaling,
                                  int64_t adapters, int64_t R, int dtype) {
    return {reinterpret_cast<const void*>(lora_A), reinterpret_cast<const void*>(lora_B), ends, scaling, adapters, R,
            dtype_of("adapter_dtype", dtype)};
}

}  // namespace peftk
