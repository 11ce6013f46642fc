// The module peftk._cuda: takes device pointers, sizes and a stream, and launches kernels. One header per operation.
#include <pybind11/pybind11.h>

#include "bindings/cuda_direct_calls.h"
#include "bindings/cuda_lora_linear.h"
#include "bindings/cuda_merge.h"
#include "bindings/cuda_segments.h"

// Safe without a GIL: nothing is kept between calls.
PYBIND11_MODULE(_cuda, module, pybind11::mod_gil_not_used()) {
    module.doc() = "peftk's CUDA kernels. They take device pointers, sizes and a stream.";
#ifdef PEFTK_CUDA_ON_HOST
    module.attr("device") = "cpu";  // tests compile this module for the host
#else
    module.attr("device") = "cuda";
#endif
    peftk::cuda::define_lora_linear(module);
    peftk::cuda::define_direct_calls(module);
    peftk::cuda::define_merge(module);
    peftk::cuda::define_segments(module);
}
