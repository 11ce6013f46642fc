// The arguments of merge and unmerge as Python passes them: addresses, sizes, dtype codes.
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

inline MergeArgs merge_args(uintptr_t weight, int64_t weight_stride, uintptr_t out, int64_t out_stride,
                            uintptr_t lora_A, uintptr_t lora_B, uintptr_t code, int64_t N, int64_t K, int64_t R,
                            float scaling, int weight_dtype, int adapter_dtype) {
    return {reinterpret_cast<const void*>(weight),
            weight_stride,
            reinterpret_cast<void*>(out),
            out_stride,
            reinterpret_cast<const void*>(lora_A),
            reinterpret_cast<const void*>(lora_B),
            reinterpret_cast<int8_t*>(code),
            N,
            K,
            R,
            scaling,
            dtype_of("weight_dtype", weight_dtype),
            dtype_of("adapter_dtype", adapter_dtype)};
}

// The names of the above, in its order, for pybind11.
#define PEFTK_MERGE_ARGS                                                                                        \
    pybind11::arg("weight"), pybind11::arg("weight_stride"), pybind11::arg("out"), pybind11::arg("out_stride"), \
        pybind11::arg("lora_A"), pybind11::arg("lora_B"), pybind11::arg("code"), pybind11::arg("N"),            \
        pybind11::arg("K"), pybind11::arg("R"), pybind11::arg("scaling"), pybind11::arg("weight_dtype"),        \
        pybind11::arg("adapter_dtype")

}  // namespace peftk
