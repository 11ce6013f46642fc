// merge, unmerge and both at once of peftk._cpu, and the checksum of what they leave.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <tuple>
#include <vector>

#include "bindings/dtype_arg.h"
#include "cpu/checksum.h"
#include "cpu/merge.h"

namespace peftk {

// lora_A, lora_B, the end of each adapter's ranks, their scalings, their dtype, the halves, the far codes and how many,
// the raw values and how many. The last four are of a side that W comes from.
using MergeSideArgs = std::tuple<uintptr_t, uintptr_t, std::vector<int64_t>, std::vector<float>, int, uintptr_t,
                                 uintptr_t, int64_t, uintptr_t, int64_t>;

// Points into `args`.
inline MergeSide merge_side(const std::optional<MergeSideArgs>& args) {
    if (!args) return {};
    const auto& [lora_A, lora_B, ends, scaling, dtype, halves, far, far_count, raws, raw_count] = *args;
    if (ends.empty() || ends.size() != scaling.size()) {
        throw std::invalid_argument("scaling: expected one for each of 1 or more adapters, got " +
                                    std::to_string(scaling.size()) + " for " + std::to_string(ends.size()));
    }
    const MergeFactors factors{reinterpret_cast<const void*>(lora_A),
                               reinterpret_cast<const void*>(lora_B),
                               ends.data(),
                               scaling.data(),
                               int64_t(ends.size()),
                               ends.back(),
                               dtype_of("adapter_dtype", dtype)};
    return {factors,   reinterpret_cast<uint8_t*>(halves),  nullptr,  reinterpret_cast<const int8_t*>(far),
            far_count, reinterpret_cast<const void*>(raws), raw_count};
}

template <class Bits>
pybind11::array bits_of(const std::vector<RawWeight>& raws) {
    pybind11::array_t<Bits> bits(pybind11::ssize_t(raws.size()));
    Bits* to = bits.mutable_data();
    for (const RawWeight& raw : raws) *to++ = Bits(raw.bits);
    return bits;
}

inline void bind_merge(pybind11::module_& module) {
    namespace py = pybind11;
    module.def(
        "remerge",
        [](uintptr_t weight, int64_t stride, int64_t N, int64_t K, int dtype, const std::optional<MergeSideArgs>& from,
           const std::optional<MergeSideArgs>& to, int threads) {
            MergePass pass{};
            pass.weight = reinterpret_cast<void*>(weight);
            pass.stride = stride, pass.N = N, pass.K = K, pass.dtype = dtype_of("dtype", dtype);
            pass.from = merge_side(from), pass.to = merge_side(to);
            py::tuple outcome;
            const py::gil_scoped_release release;
            // made while the pass can still be undone: there may be no memory for it
            remerge(pass, threads, [&](const MergeResult& result) {
                const py::gil_scoped_acquire acquire;
                outcome = py::make_tuple(
                    result.finite, result.checksum,
                    py::array_t<int8_t>(py::ssize_t(result.far.size()), result.far.data()),
                    pass.dtype == kFloat32 ? bits_of<int32_t>(result.raws) : bits_of<int16_t>(result.raws));
            });
            return outcome;
        },
        py::arg("weight"), py::arg("stride"), py::arg("N"), py::arg("K"), py::arg("dtype"), py::arg("from_side"),
        py::arg("to_side"), py::arg("threads"));
    module.def(
        "checksum",
        [](uintptr_t weight, int64_t stride, int64_t N, int64_t K, int dtype, int threads) {
            const Dtype type = dtype_of("dtype", dtype);
            const py::gil_scoped_release release;
            return checksum(reinterpret_cast<const void*>(weight), stride, N, K, type, threads);
        },
        py::arg("weight"), py::arg("stride"), py::arg("N"), py::arg("K"), py::arg("dtype"), py::arg("threads"));
}

}  // namespace peftk
