// The adapters of a call, on every device: a table in the layout of peftk/adapters/table.py, or a single adapter.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/host_device.h"

namespace peftk {

constexpr int kPage = 16;  // ranks per page

// Addresses are 0 where there is no tensor; strides are in elements.
struct OneAdapter {
    int64_t A, stride_A;              // [rank, K], contiguous along K
    int64_t B, stride_Bn, stride_Br;  // [N, rank]
    int64_t bias_A, bias_B;           // [rank], [N]
    int32_t rank, activation;
    float scaling;
};

// A table; or, if `rows` is null, the adapter `one`. count 0: no adapters, only the base layer.
struct Adapters {
    const int64_t* pages;   // [P, 5]
    const int32_t* rows;    // [slice_count * count, 4]
    const float* scaling;   // [slice_count * count]
    const int64_t* biases;  // [slice_count * count, 2]
    const int32_t* slices;  // [slice_count + 1, 2]: first column, first page of z; null: a single slice
    int32_t slice_count;
    int32_t count;    // number of valid ids
    int32_t z_pages;  // pages per row of z, over all slices
    Dtype dtype;
    OneAdapter one;
};

static inline Adapters adapters_of_one(const OneAdapter& one, Dtype dtype) {
    return {nullptr, nullptr, nullptr, nullptr, nullptr, 1, 1, (one.rank + kPage - 1) / kPage, dtype, one};
}

// An adapter of one slice of y's columns, as kernels use it.
struct Adapter {
    int32_t rank, activation;
    float scaling;
    int64_t first_page;
    int64_t bias_A, bias_B;  // addresses, or 0
};

// Addresses and strides of 16 ranks of an adapter.
struct Page {
    int64_t A, stride_A;              // [r, K], contiguous along K
    int64_t B, stride_Bn, stride_Br;  // [N, r]
};

static inline PEFTK_HOST_DEVICE Adapter adapter_at(const Adapters& adapters, int64_t entry) {
    if (!adapters.rows) {
        const OneAdapter& one = adapters.one;
        return {one.rank, one.activation, one.scaling, 0, one.bias_A, one.bias_B};
    }
    const int32_t* row = adapters.rows + entry * 4;
    const int64_t* biases = adapters.biases + entry * 2;
    return {row[1], row[2], adapters.scaling[entry], row[0], biases[0], biases[1]};
}

static inline PEFTK_HOST_DEVICE Page page_at(const Adapters& adapters, int64_t page) {
    if (!adapters.rows) {
        const OneAdapter& one = adapters.one;
        const int64_t ranks = page * kPage * size_of(adapters.dtype);
        return {one.A + ranks * one.stride_A, one.stride_A, one.B + ranks * one.stride_Br, one.stride_Bn,
                one.stride_Br};
    }
    const int64_t* p = adapters.pages + page * 5;
    return {p[0], p[1], p[2], p[3], p[4]};
}

// Whether the slot of an id below `count` has an adapter.
static inline bool is_occupied(const Adapters& adapters, int64_t id) {
    return !adapters.rows || adapters.rows[4 * id + 3];
}

}  // namespace peftk
