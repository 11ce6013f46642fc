// The class Adapters of peftk._cpu and peftk._cuda: the arguments that stay the same between calls with the same
// adapters. An object holds addresses; the caller keeps the tensors alive.
#pragma once

#include <pybind11/pybind11.h>

#include "bindings/dtype_arg.h"
#include "bindings/named.h"
#include "common/adapters.h"

namespace peftk {

template <class T>
static inline T* address(uintptr_t value) {
    return reinterpret_cast<T*>(value);
}

template <>
constexpr bool kHasClass<Adapters> = true;

static inline void define_adapters(pybind11::module_& module) {
    const auto adapters = define_class<Adapters>(module, "Adapters", "The adapters that the ids of a call refer to.");
    define(adapters, "none", "(*, dtype)", "No adapters: only the base layer.", [](int dtype) {
        Adapters none{};
        none.dtype = dtype_of("dtype", dtype);
        return none;
    });
    define(adapters, "one",
           "(*, A, stride_A, B, stride_Bn, stride_Br, bias_A, bias_B, rank, activation, scaling, dtype)",
           "One adapter, given by its tensors: A [rank, K], B [N, rank], bias_A [rank], bias_B [N].",
           [](int64_t A, int64_t stride_A, int64_t B, int64_t stride_Bn, int64_t stride_Br, int64_t bias_A,
              int64_t bias_B, int rank, int activation, float scaling, int dtype) {
               return adapters_of_one({A, stride_A, B, stride_Bn, stride_Br, bias_A, bias_B, rank, activation, scaling},
                                      dtype_of("dtype", dtype));
           });
    define(adapters, "of_table", "(*, pages, rows, scaling, biases, slices=0, slice_count, count, z_pages, dtype)",
           "The tensors of an AdapterTable.",
           [](uintptr_t pages, uintptr_t rows, uintptr_t scaling, uintptr_t biases, uintptr_t slices, int slice_count,
              int count, int z_pages, int dtype) {
               return Adapters{address<int64_t>(pages),
                               address<int32_t>(rows),
                               address<float>(scaling),
                               address<int64_t>(biases),
                               address<int32_t>(slices),
                               slice_count,
                               count,
                               z_pages,
                               dtype_of("dtype", dtype),
                               {}};
           });
}

}  // namespace peftk
