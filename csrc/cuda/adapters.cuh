// The adapters of a call, as peftk/adapters/table.py lays them out, or one adapter as arguments of the launch.
#pragma once

#include "cuda/lora_linear.h"

namespace peftk::cuda {

constexpr int kPage = 16;  // ranks

// What a kernel needs to know about an adapter of one slice of y's columns.
struct Adapter {
    int rank, activation;
    float scaling;
    int64_t first_page;
    int64_t bias_A, bias_B;  // addresses, or 0
};

// 16 ranks of an adapter, where they lie.
struct Page {
    int64_t A, stride_A;              // [r, K], contiguous along K
    int64_t B, stride_Bn, stride_Br;  // [N, r]
};

__device__ inline Adapter adapter_at(const Adapters& adapters, int entry) {
    if (!adapters.rows) {
        const OneAdapter& one = adapters.one;
        return {one.rank, one.activation, one.scaling, 0, one.bias_A, one.bias_B};
    }
    const int32_t* row = adapters.rows + int64_t(entry) * 4;
    const int64_t* biases = adapters.biases + int64_t(entry) * 2;
    return {row[1], row[2], adapters.scaling[entry], row[0], biases[0], biases[1]};
}

__device__ inline Page page_at(const Adapters& adapters, int64_t page) {
    if (!adapters.rows) {
        const OneAdapter& one = adapters.one;
        const int64_t ranks = page * kPage * size_of(adapters.dtype);
        return {one.A + ranks * one.stride_A, one.stride_A, one.B + ranks * one.stride_Br, one.stride_Bn,
                one.stride_Br};
    }
    const int64_t* p = adapters.pages + page * 5;
    return {p[0], p[1], p[2], p[3], p[4]};
}

// A slice of y's columns that has adapters of its own, and its pages of z.
struct Slice {
    int from, to;
    int first_page, end_page;
    int first_entry;  // of adapter 0
};

__device__ inline Slice slice_at(const Adapters& adapters, int slice, int N) {
    if (!adapters.slices) return {0, N, 0, adapters.z_pages, 0};
    const int32_t* s = adapters.slices + slice * 2;
    return {s[0], s[2], s[1], s[3], slice * adapters.count};
}

}  // namespace peftk::cuda
