// merge and unmerge of peftk._cpu, and the inspection of what they left.
#pragma once

#include <pybind11/pybind11.h>

#include "bindings/merge_args.h"
#include "cpu/checksum.h"
#include "cpu/merge.h"

namespace peftk {

// A kernel as a Python function: merge_args' parameters, then the number of threads.
template <void (*kernel)(const MergeArgs&, int)>
void bind_merge(pybind11::module_& module, const char* name) {
    namespace py = pybind11;
    module.def(
        name,
        [](uintptr_t weight, int64_t weight_stride, uintptr_t out, int64_t out_stride, uintptr_t lora_A,
           uintptr_t lora_B, uintptr_t code, int64_t N, int64_t K, int64_t R, float scaling, int weight_dtype,
           int adapter_dtype, int threads) {
            const MergeArgs args = merge_args(weight, weight_stride, out, out_stride, lora_A, lora_B, code, N, K, R,
                                              scaling, weight_dtype, adapter_dtype);
            const py::gil_scoped_release release;
            kernel(args, threads);
        },
        PEFTK_MERGE_ARGS, py::arg("threads"));
}

inline void bind_merge(pybind11::module_& module) {
    bind_merge<merge>(module, "merge");
    bind_merge<unmerge>(module, "unmerge");
    module.def(
        "inspect",
        [](uintptr_t weight, int64_t stride, int64_t N, int64_t K, int dtype, int threads) {
            const Dtype type = dtype_of("dtype", dtype);
            Inspection result;
            {
                const pybind11::gil_scoped_release release;
                result = inspect(reinterpret_cast<const void*>(weight), stride, N, K, type, threads);
            }
            return pybind11::make_tuple(result.checksum, result.finite);
        },
        pybind11::arg("weight"), pybind11::arg("stride"), pybind11::arg("N"), pybind11::arg("K"),
        pybind11::arg("dtype"), pybind11::arg("threads"));
}

}  // namespace peftk
