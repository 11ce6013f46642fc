// peftk._cuda: device pointers, sizes and a stream in, launches out. One header for each operation.
#include <pybind11/pybind11.h>

#include "bindings/cuda_merge.h"
#include "bindings/cuda_segments.h"

// Without a GIL too: nothing is kept between calls.
PYBIND11_MODULE(_cuda, module, pybind11::mod_gil_not_used()) {
    module.doc() = "peftk's CUDA kernels: device pointers, sizes and a stream in, nothing else.";
    peftk::cuda::define_merge(module);
    peftk::cuda::define_segments(module);
}
