// The merge of peftk._cuda.
#pragma once

#include <pybind11/pybind11.h>

#include "bindings/cuda_status.h"
#include "bindings/merge_args.h"
#include "cuda/merge.h"

namespace peftk::cuda {

namespace py = pybind11;

// A launcher as a Python function.
template <cudaError_t (*launch)(const MergeArgs&, cudaStream_t)>
void define_merge_launcher(py::module_& module, const char* name) {
    module.def(
        name,
        [name](uintptr_t weight, int64_t weight_stride, uintptr_t out, int64_t out_stride, int64_t N, int64_t K,
               int dtype, uintptr_t lora_A, uintptr_t lora_B, uintptr_t ends, uintptr_t scaling, int64_t adapters,
               int64_t R, int adapter_dtype, uintptr_t code, uintptr_t stream) {
            const MergeArgs args{reinterpret_cast<const void*>(weight),
                                 weight_stride,
                                 reinterpret_cast<void*>(out),
                                 out_stride,
                                 merge_factors(lora_A, lora_B, reinterpret_cast<const int64_t*>(ends),
                                               reinterpret_cast<const float*>(scaling), adapters, R, adapter_dtype),
                                 reinterpret_cast<int8_t*>(code),
                                 N,
                                 K,
                                 dtype_of("dtype", dtype)};
            check(launch(args, reinterpret_cast<cudaStream_t>(stream)), name);
        },
        py::arg("weight"), py::arg("weight_stride"), py::arg("out"), py::arg("out_stride"), py::arg("N"), py::arg("K"),
        py::arg("dtype"), py::arg("lora_A"), py::arg("lora_B"), py::arg("ends"), py::arg("scaling"),
        py::arg("adapters"), py::arg("R"), py::arg("adapter_dtype"), py::arg("code"), py::arg("stream"));
}

inline void define_merge(py::module_& module) {
    define_merge_launcher<merge>(module, "merge");
    define_merge_launcher<unmerge>(module, "unmerge");
}

}  // namespace peftk::cuda
