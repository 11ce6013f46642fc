// The module peftk._cpu. It takes addresses, sizes and codes, and peftk/backends/cpu.py checks them before each call.
#include <pybind11/pybind11.h>

#include "bindings/adapters.h"
#include "bindings/cpu_lora_linear.h"
#include "bindings/cpu_merge.h"
#include "bindings/cpu_peak.h"
#include "bindings/direct_calls.h"
#include "cpu/blocking.h"
#include "cpu/levels.h"
#include "cpu/thread_pool.h"

namespace py = pybind11;

namespace peftk {

namespace {

py::list simd_levels() {
    py::list names;
    for (int level = 0; level < kLevels; level++) {
        if (level_runs_here(Level(level))) names.append(level_name(Level(level)));
    }
    return names;
}

void bind_levels(py::module_& m) {
    m.def("simd_levels", simd_levels, "The SIMD levels that this build and machine support, ascending.");
    m.def("simd_level", [] { return level_name(level_in_use()); }, "The SIMD level in use.");
    m.def("use_simd_level", use_level, py::arg("name"), "Chooses a SIMD level for the whole process.");
}

void bind_blocking(py::module_& m) {
    m.def(
        "blocking",
        [] {
            const Blocking b = blocking_in_use();
            return py::make_tuple(b.rows, b.l2_rows, b.steps, b.blocks);
        },
        "How the product is cut: rows, l2_rows, steps, blocks.");
    m.def(
        "use_blocking",
        [](int16_t rows, int16_t l2_rows, int16_t steps, int16_t blocks) {
            use_blocking({rows, l2_rows, steps, blocks});
        },
        py::arg("rows"), py::arg("l2_rows"), py::arg("steps"), py::arg("blocks"),
        "Chooses how the product is cut, for the whole process. Changes no bit of a result.");
}

}  // namespace

}  // namespace peftk

// Safe without a GIL: calls share only the level and the blocking in use, which are atomic, and the worker threads,
// which have a lock. Scratch memory is per thread.
PYBIND11_MODULE(_cpu, m, pybind11::mod_gil_not_used()) {
    m.def("borrows_openmp", peftk::borrows_openmp,
          "Whether jobs run on torch's OpenMP threads instead of peftk's own.");
    m.def("pool_workers", peftk::pool_workers, "Worker threads that this process has started.");
    peftk::bind_levels(m);
    peftk::bind_blocking(m);
    peftk::define_adapters(m);
    peftk::bind_lora_linear(m);
    peftk::bind_merge(m);
    peftk::bind_direct_calls(m.ptr());
    peftk::bind_peak(m);
}
