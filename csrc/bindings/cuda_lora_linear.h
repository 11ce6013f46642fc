// The fused linear layer of peftk._cuda.
#pragma once

#include <pybind11/pybind11.h>

#include "bindings/cuda_status.h"
#include "bindings/dtype_arg.h"
#include "cuda/lora_linear.h"

namespace peftk::cuda {

inline void define_lora_linear(pybind11::module_& module) {
    namespace py = pybind11;
    module.attr("most_rows") = kMostRows;

    py::class_<LoraLinearPlan>(module, "LoraLinearPlan")
        .def_readonly("shrink_splits", &LoraLinearPlan::shrink_splits)
        .def_readonly("expand_splits", &LoraLinearPlan::expand_splits)
        .def_readonly("shrink_tiles", &LoraLinearPlan::shrink_tiles)
        .def_readonly("expand_tiles", &LoraLinearPlan::expand_tiles)
        .def_readonly("partials", &LoraLinearPlan::partials)
        .def_readonly("counters", &LoraLinearPlan::counters)
        .def_readonly("shared", &LoraLinearPlan::shared);
    module.def("plan_lora_linear", &plan_lora_linear, py::arg("M"), py::arg("N"), py::arg("K"), py::arg("z_pages"),
               py::arg("processors"));

    // What does not change between calls with the same adapters. It holds addresses: the caller keeps the tensors.
    py::class_<Adapters>(module, "Adapters")
        .def_static(
            "of_table",
            [](uintptr_t pages, uintptr_t rows, uintptr_t scaling, uintptr_t biases, uintptr_t slices, int slice_count,
               int count, int z_pages, int dtype) {
                return Adapters{reinterpret_cast<const int64_t*>(pages),
                                reinterpret_cast<const int32_t*>(rows),
                                reinterpret_cast<const float*>(scaling),
                                reinterpret_cast<const int64_t*>(biases),
                                reinterpret_cast<const int32_t*>(slices),
                                slice_count,
                                count,
                                z_pages,
                                dtype_of("adapter_dtype", dtype),
                                {}};
            },
            py::arg("pages"), py::arg("rows"), py::arg("scaling"), py::arg("biases"), py::arg("slices"),
            py::arg("slice_count"), py::arg("count"), py::arg("z_pages"), py::arg("dtype"))
        .def_static(
            "one",
            [](int64_t A, int64_t stride_A, int64_t B, int64_t stride_Bn, int64_t stride_Br, int64_t bias_A,
               int64_t bias_B, int rank, int activation, float scaling, int dtype) {
                Adapters adapters = {};
                adapters.count = 1;
                adapters.z_pages = (rank + 15) / 16;
                adapters.dtype = dtype_of("adapter_dtype", dtype);
                adapters.one = {A, stride_A, B, stride_Bn, stride_Br, bias_A, bias_B, rank, activation, scaling};
                return adapters;
            },
            py::arg("A"), py::arg("stride_A"), py::arg("B"), py::arg("stride_Bn"), py::arg("stride_Br"),
            py::arg("bias_A"), py::arg("bias_B"), py::arg("rank"), py::arg("activation"), py::arg("scaling"),
            py::arg("dtype"))
        .def_static(
            "none",
            [](int dtype) {
                Adapters adapters = {};
                adapters.dtype = dtype_of("adapter_dtype", dtype);
                return adapters;
            },
            py::arg("dtype"));

    module.def(
        "lora_linear",
        [](uintptr_t x, int64_t x_stride, uintptr_t weight, int64_t weight_stride, uintptr_t bias, int bias_dtype,
           uintptr_t y, uintptr_t z, bool z_dense, uintptr_t ids, const Adapters& adapters, int M, int N, int K,
           int dtype, const LoraLinearPlan& plan, uintptr_t partials, uintptr_t counters, int device,
           uintptr_t stream) {
            const LoraLinearArgs args{reinterpret_cast<const void*>(x),
                                      x_stride,
                                      reinterpret_cast<const void*>(weight),
                                      weight_stride,
                                      reinterpret_cast<const void*>(bias),
                                      reinterpret_cast<void*>(y),
                                      reinterpret_cast<float*>(z),
                                      reinterpret_cast<const int32_t*>(ids),
                                      adapters,
                                      M,
                                      N,
                                      K,
                                      dtype_of("dtype", dtype),
                                      dtype_of("bias_dtype", bias_dtype),
                                      z_dense,
                                      reinterpret_cast<float*>(partials),
                                      reinterpret_cast<int32_t*>(counters)};
            check(lora_linear(args, plan, device, reinterpret_cast<cudaStream_t>(stream)), "lora_linear");
        },
        py::arg("x"), py::arg("x_stride"), py::arg("weight"), py::arg("weight_stride"), py::arg("bias"),
        py::arg("bias_dtype"), py::arg("y"), py::arg("z"), py::arg("z_dense"), py::arg("ids"), py::arg("adapters"),
        py::arg("M"), py::arg("N"), py::arg("K"), py::arg("dtype"), py::arg("plan"), py::arg("partials"),
        py::arg("counters"), py::arg("device"), py::arg("stream"));
}

}  // namespace peftk::cuda
