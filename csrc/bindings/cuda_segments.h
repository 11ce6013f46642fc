// The segments of peftk._cuda.
#pragma once

#include <pybind11/pybind11.h>

#include "bindings/cuda_status.h"
#include "cuda/segments.h"

namespace peftk::cuda {

inline void define_segments(pybind11::module_& module) {
    namespace py = pybind11;
    module.def("segments_workspace", &segments_workspace, py::arg("M"), py::arg("adapters"));
    module.def("segments_shared", &segments_shared, py::arg("M"));
    module.def(
        "segments",
        [](uintptr_t ids, int64_t stride, bool wide, int64_t M, int64_t adapters, uintptr_t order, uintptr_t sorted_ids,
           uintptr_t ends, uintptr_t starts, uintptr_t owners, uintptr_t blocks, uintptr_t workspace, int device,
           uintptr_t stream) {
            const SegmentsArgs args{reinterpret_cast<const void*>(ids),
                                    stride,
                                    wide,
                                    M,
                                    adapters,
                                    reinterpret_cast<int64_t*>(order),
                                    reinterpret_cast<int*>(sorted_ids),
                                    reinterpret_cast<int*>(ends),
                                    reinterpret_cast<int*>(starts),
                                    reinterpret_cast<int*>(owners),
                                    reinterpret_cast<int*>(blocks),
                                    reinterpret_cast<int*>(workspace)};
            check(segments(args, device, reinterpret_cast<cudaStream_t>(stream)), "segments");
        },
        py::arg("ids"), py::arg("stride"), py::arg("wide"), py::arg("M"), py::arg("adapters"), py::arg("order"),
        py::arg("sorted_ids"), py::arg("ends"), py::arg("starts"), py::arg("owners"), py::arg("blocks"),
        py::arg("workspace"), py::arg("device"), py::arg("stream"));
}

}  // namespace peftk::cuda
