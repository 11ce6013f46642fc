// peftk._cuda: device pointers, sizes and a stream in, launches out. The Python side makes the device current.
#include <pybind11/pybind11.h>

#include "bindings/merge_args.h"
#include "cuda/check.h"
#include "cuda/merge.h"

namespace py = pybind11;

namespace peftk {
namespace {

// A launcher as a Python function: merge_args' parameters, then the stream.
template <cudaError_t (*launch)(const MergeArgs&, cudaStream_t)>
void define(py::module_& module, const char* name) {
    module.def(
        name,
        [name](uintptr_t weight, int64_t weight_stride, uintptr_t out, int64_t out_stride, uintptr_t lora_A,
               uintptr_t lora_B, uintptr_t code, int64_t N, int64_t K, int64_t R, float scaling, int weight_dtype,
               int adapter_dtype, uintptr_t stream) {
            const MergeArgs args = merge_args(weight, weight_stride, out, out_stride, lora_A, lora_B, code, N, K, R,
                                              scaling, weight_dtype, adapter_dtype);
            cuda::check(launch(args, reinterpret_cast<cudaStream_t>(stream)), name);
        },
        PEFTK_MERGE_ARGS, py::arg("stream"));
}

}  // namespace
}  // namespace peftk

// Without a GIL too: nothing is kept between calls.
PYBIND11_MODULE(_cuda, module, py::mod_gil_not_used()) {
    module.doc() = "peftk's CUDA kernels: device pointers, sizes and a stream in, nothing else.";
    peftk::define<peftk::cuda::merge>(module, "merge");
    peftk::define<peftk::cuda::unmerge>(module, "unmerge");
}
