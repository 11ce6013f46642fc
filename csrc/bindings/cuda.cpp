// peftk._cuda: device pointers, sizes and a stream in, launches out. One header for each operation.
#include <pybind11/pybind11.h>

#include "bindings/cuda_lora_linear.h"
#include "bindings/cuda_merge.h"
#include "bindings/cuda_segments.h"

// Without a GIL too: nothing is kept between calls.
PYBIND11_MODULE(_cuda, module, pybind11::mod_gil_not_used()) {
    module.doc() = "peftk's CUDA kernels: device pointers, sizes and a stream in, nothing else.";
#ifdef PEFTK_CUDA_ON_HOST
    module.attr("device") = "cpu";  // tests compile this module for the host
#else
    module.attr("device") = "cuda";
#endif
    peftk::cuda::define_lora_linear(module);
    peftk::cuda::define_merge(module);
    peftk::cuda::define_segments(module);
}
