// The slices of y's columns, each with its own adapters.
#pragma once

#include "cuda/lora_linear.h"

namespace peftk::cuda {

// A slice of y's columns with its own adapters, and its pages of z.
struct Slice {
    int from, to;
    int first_page, end_page;
    int first_entry;  // index of adapter 0 in Adapters::rows
};

__device__ inline Slice slice_at(const Adapters& adapters, int slice, int N) {
    if (!adapters.slices) return {0, N, 0, adapters.z_pages, 0};
    const int32_t* s = adapters.slices + slice * 2;
    return {s[0], s[2], s[1], s[3], slice * adapters.count};
}

}  // namespace peftk::cuda
