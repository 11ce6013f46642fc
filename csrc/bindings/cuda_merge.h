// The merge of peftk._cuda. Every launch takes the list of layers first, and the device and the stream last.
#pragma once

#include <pybind11/pybind11.h>

#include <utility>

#include "bindings/cuda_status.h"
#include "bindings/dtype_arg.h"
#include "cuda/merge.h"

namespace peftk::cuda {

// An address from Python, which converts to a pointer of any type.
struct Address {
    uintptr_t value;
    template <typename T>
    operator T*() const {
        return reinterpret_cast<T*>(value);
    }
};

template <typename... Names, typename Launch>
void define_merge_launch(pybind11::module_& module, const char* name, Launch launch, const Names&... names) {
    namespace py = pybind11;
    module.def(name, launch, py::arg("table"), py::arg("ends"), py::arg("scaling"), py::arg("layers"), py::arg("tiles"),
               py::arg("dtype"), py::arg("adapter_dtype"), py::arg(names)..., py::arg("device"), py::arg("stream"));
}

inline MergeList merge_list(uintptr_t table, uintptr_t ends, uintptr_t scaling, int layers, int64_t tiles, int dtype,
                            int adapter_dtype) {
    return {Address{table},
            Address{ends},
            Address{scaling},
            layers,
            tiles,
            dtype_of("dtype", dtype),
            dtype_of("adapter_dtype", adapter_dtype)};
}

inline void define_merge(pybind11::module_& module) {
    namespace py = pybind11;
    using address = uintptr_t;
    module.def(
        "merge_tile",
        [](int dtype) {
            const MergeTile tile = merge_tile(dtype_of("dtype", dtype));
            return std::tuple(tile.rows, tile.columns, tile.shared);
        },
        py::arg("dtype"));
    define_merge_launch(
        module, "merge",
        [](address table, address ends, address scaling, int layers, int64_t tiles, int dtype, int adapter_dtype,
           address merged, address row_sums, address refused, address raw_count, address raw_keys, address raw_values,
           int room, int device, address stream) {
            const MergeList list = merge_list(table, ends, scaling, layers, tiles, dtype, adapter_dtype);
            const MergeNotes notes{Address{merged},
                                   Address{row_sums},
                                   Address{refused},
                                   Address{raw_count},
                                   Address{raw_keys},
                                   Address{raw_values},
                                   room};
            check(merge(list, notes, device, Address{stream}), "merge");
        },
        "merged", "row_sums", "refused", "raw_count", "raw_keys", "raw_values", "room");
    define_merge_launch(
        module, "unmerge",
        [](address table, address ends, address scaling, int layers, int64_t tiles, int dtype, int adapter_dtype,
           address merged, int device, address stream) {
            const MergeList list = merge_list(table, ends, scaling, layers, tiles, dtype, adapter_dtype);
            check(unmerge(list, Address{merged}, device, Address{stream}), "unmerge");
        },
        "merged");
    define_merge_launch(
        module, "merge_restore",
        [](address table, address ends, address scaling, int layers, int64_t tiles, int dtype, int adapter_dtype,
           address raw_keys, address raw_values, int64_t count, int device, address stream) {
            const MergeList list = merge_list(table, ends, scaling, layers, tiles, dtype, adapter_dtype);
            check(restore(list, Address{raw_keys}, Address{raw_values}, count, device, Address{stream}),
                  "merge_restore");
        },
        "raw_keys", "raw_values", "count");
    define_merge_launch(
        module, "merge_sum_rows",
        [](address table, address ends, address scaling, int layers, int64_t tiles, int dtype, int adapter_dtype,
           address row_sums, int device, address stream) {
            const MergeList list = merge_list(table, ends, scaling, layers, tiles, dtype, adapter_dtype);
            check(sum_rows(list, Address{row_sums}, device, Address{stream}), "merge_sum_rows");
        },
        "row_sums");
}

}  // namespace peftk::cuda
