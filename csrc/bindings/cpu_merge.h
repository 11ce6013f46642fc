// merge and unmerge of peftk._cpu, alone or in one pass, and the checksum of the merged weight.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "bindings/adapters.h"
#include "bindings/dtype_arg.h"
#include "bindings/named.h"
#include "cpu/checksum.h"
#include "cpu/merge.h"

namespace peftk {

// W, changed in place.
struct MergeWeight {
    void* weight;
    int64_t stride, N, K;
    Dtype dtype;
};

// Adapters side by side and their codes. `side()` points into this object, which must outlive it.
struct MergeSideArgs {
    uintptr_t lora_A, lora_B;
    std::vector<int64_t> ends;
    std::vector<float> scaling;
    Dtype dtype;
    uintptr_t halves, far;
    int64_t far_count;
    uintptr_t raws;
    int64_t raw_count;

    MergeSide side() const {
        const MergeFactors factors{address<void>(lora_A), address<void>(lora_B), ends.data(), scaling.data(),
                                   int64_t(ends.size()),  ends.back(),           dtype};
        return {factors,   address<uint8_t>(halves), nullptr,  address<int8_t>(far),
                far_count, address<void>(raws),      raw_count};
    }
};

template <>
constexpr bool kHasClass<MergeWeight> = true;
template <>
constexpr bool kHasClass<MergeSideArgs> = true;

template <class Bits>
pybind11::array bits_of(const std::vector<RawWeight>& raws) {
    pybind11::array_t<Bits> bits(pybind11::ssize_t(raws.size()));
    Bits* to = bits.mutable_data();
    for (const RawWeight& raw : raws) *to++ = Bits(raw.bits);
    return bits;
}

static inline void define_merge_arguments(pybind11::module_& module) {
    const auto weight = define_class<MergeWeight>(module, "MergeWeight", "W, changed in place.");
    define(weight, "of", "(*, weight, stride, N, K, dtype)", "weight [N, K], contiguous rows.",
           [](uintptr_t weight, int64_t stride, int64_t N, int64_t K, int dtype) {
               return MergeWeight{address<void>(weight), stride, N, K, dtype_of("dtype", dtype)};
           });
    const auto side =
        define_class<MergeSideArgs>(module, "MergeSide", "Adapters side by side, and the codes that undo their merge.");
    define(side, "of", "(*, lora_A, lora_B, ends, scaling, dtype, halves, far=0, far_count=0, raws=0, raw_count=0)",
           "lora_A [R, K], lora_B [N, R]; the last four arguments are for from_side only.",
           [](uintptr_t lora_A, uintptr_t lora_B, const std::vector<int64_t>& ends, const std::vector<float>& scaling,
              int dtype, uintptr_t halves, uintptr_t far, int64_t far_count, uintptr_t raws, int64_t raw_count) {
               if (ends.empty() || ends.size() != scaling.size()) {
                   throw std::invalid_argument("scaling: expected one for each adapter, and at least one, got " +
                                               std::to_string(scaling.size()) + " for " + std::to_string(ends.size()));
               }
               return MergeSideArgs{lora_A, lora_B, ends,      scaling, dtype_of("dtype", dtype),
                                    halves, far,    far_count, raws,    raw_count};
           });
}

static inline void bind_merge(pybind11::module_& module) {
    namespace py = pybind11;
    define_merge_arguments(module);
    define(module, "remerge", "(weight, from_side, to_side, *, threads)",
           "Unmerges from_side and merges to_side in one pass over W. Returns (finite, checksum, far codes, raw "
           "weights' bits).",
           [](const MergeWeight& weight, const MergeSideArgs* from, const MergeSideArgs* to, int threads) {
               MergePass pass{};
               pass.weight = weight.weight, pass.dtype = weight.dtype;
               pass.stride = weight.stride, pass.N = weight.N, pass.K = weight.K;
               if (from) pass.from = from->side();
               if (to) pass.to = to->side();
               py::tuple outcome;
               const py::gil_scoped_release release;
               // built while the pass can still be undone, since this may run out of memory
               remerge(pass, threads, [&](const MergeResult& result) {
                   const py::gil_scoped_acquire acquire;
                   outcome = py::make_tuple(
                       result.finite, result.checksum,
                       py::array_t<int8_t>(py::ssize_t(result.far.size()), result.far.data()),
                       pass.dtype == kFloat32 ? bits_of<int32_t>(result.raws) : bits_of<int16_t>(result.raws));
               });
               return outcome;
           });
    define(module, "checksum", "(weight, *, threads)", "The checksum of all bits of W.",
           [](const MergeWeight& weight, int threads) {
               const py::gil_scoped_release release;
               return checksum(weight.weight, weight.stride, weight.N, weight.K, weight.dtype, threads);
           });
}

}  // namespace peftk
