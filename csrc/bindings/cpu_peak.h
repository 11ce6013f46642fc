// The machine's roofline: see cpu/peak.h.
#pragma once

#include <pybind11/pybind11.h>

#include "common/dtype.h"
#include "cpu/peak.h"

namespace peftk {

inline void bind_peak(pybind11::module_& module) {
    namespace py = pybind11;
    module.def(
        "fma_peak",
        [](int64_t multiply_adds, int dtype, int threads) {
            const py::gil_scoped_release release;
            fma_peak(multiply_adds, dtype, threads);
        },
        py::arg("multiply_adds"), py::arg("dtype"), py::arg("threads"));
    module.def(
        "read_peak",
        [](uintptr_t from, int64_t bytes, int threads) {
            const py::gil_scoped_release release;
            return read_peak(reinterpret_cast<const void*>(from), bytes, threads);
        },
        py::arg("from_"), py::arg("bytes"), py::arg("threads"));
}

}  // namespace peftk
