// The fused linear layer of a decode step on a CUDA device: few rows, any mixture of adapters, one launch.
#pragma once

#include <cstdint>

#include "common/adapters.h"
#include "common/dtype.h"
#include "cuda/status.h"

namespace peftk::cuda {

// y[m] = x[m] Wᵀ + bias + s_i · act(z[m]) B_iᵀ + β_i with z[m] = x[m] A_iᵀ + a_i and i = ids[m]. An id outside
// 0 … count - 1 means the base layer only. Strides are in elements.
struct LoraLinearArgs {
    const void* x;  // [M, K], rows at multiples of 16 bytes
    int64_t x_stride;
    const void* weight;  // [N, K], rows at multiples of 16 bytes
    int64_t weight_stride;
    const void* bias;    // [N] or null
    void* y;             // [M, N], dense
    float* z;            // [M, 16 · z_pages]; where a row's adapter has no such rank: 0 if z_dense, else not written
    const int32_t* ids;  // [M]; null: every row uses adapter 0
    Adapters adapters;
    int32_t M, N, K;
    Dtype dtype;  // of x, weight and y: bf16 or fp16
    Dtype bias_dtype;
    bool z_dense;
    float* partials;    // as many as LoraLinearPlan::partials
    int32_t* counters;  // zero before and after the launch
};

// How a call is divided into blocks, and the memory it needs.
struct LoraLinearPlan {
    int32_t shrink_splits, expand_splits;  // ranges of K
    int32_t shrink_tiles, expand_tiles;    // including splits
    int64_t partials;                      // floats
    int64_t expand_parts;                  // where the partials of the expand tiles begin
    int64_t counters;
    int32_t z_tiles;  // shrink tiles, without their splits
    int32_t shared;   // bytes of shared memory per block
};

constexpr int kMostRows = 64;

// Whether rows of 16-bit elements start at multiples of 16 bytes.
inline bool starts_on_16(const void* rows, int64_t stride) {
    return (reinterpret_cast<uintptr_t>(rows) | uintptr_t(stride) * 2) % 16 == 0;
}

// The plan depends on these arguments only, so it may be kept. processors: of the device.
LoraLinearPlan plan_lora_linear(int M, int N, int K, int z_pages, int processors);

// Enqueues one launch on `stream`, without waiting for the device. Unsupported are M outside 1 … 64, K that is not a
// multiple of 8, rows that do not start at multiples of 16 bytes, x in fp32, and adapters in the other 16-bit type.
Status lora_linear(const LoraLinearArgs& args, const LoraLinearPlan& plan, int device, cudaStream_t stream);

}  // namespace peftk::cuda
