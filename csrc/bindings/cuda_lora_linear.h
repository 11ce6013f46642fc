// The fused linear layer of peftk._cuda.
#pragma once

#include <pybind11/pybind11.h>

#include "bindings/adapters.h"
#include "bindings/cuda_status.h"
#include "bindings/dtype_arg.h"
#include "cuda/lora_linear.h"

// Lets functions that pybind11 wraps take Adapters.
template <>
struct pybind11::detail::type_caster<peftk::Adapters> {
    const peftk::Adapters* value = nullptr;
    static constexpr auto name = const_name("Adapters");
    template <class T>
    using cast_op_type = const peftk::Adapters&;

    bool load(handle object, bool) { return (value = peftk::value_of<peftk::Adapters>(object.ptr())) != nullptr; }
    operator const peftk::Adapters&() { return *value; }
};

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
    define_adapters(module);
    module.def("plan_lora_linear", &plan_lora_linear, py::arg("M"), py::arg("N"), py::arg("K"), py::arg("z_pages"),
               py::arg("processors"));

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
