// Exact products of any two storage types on the tensor cores.
//
// Two factors of the same 16-bit type are multiplied directly. Any other factors are split into bf16 terms whose sum is
// exactly the factor: 3 for fp32 (24 = 3 * 8 significant bits), 2 for fp16 (11 = 8 + 3). All pairs of terms are
// multiplied.
//
// Products are exact, sums are not. Tensor cores align the products and the previous sum to the largest of them and
// truncate (Fasi et al., Numerical behavior of NVIDIA tensor cores, 2021). In a long sum truncation errors add up,
// whereas rounding errors cancel. So kernels keep sums on the tensor cores short, and add those in fp32.
#pragma once

#include "cuda/instructions.cuh"
#include "cuda/storage.cuh"

namespace peftk::cuda {

template <typename T>
constexpr int kTerms = 3;  // float
template <>
constexpr int kTerms<__half> = 2;
template <>
constexpr int kTerms<__nv_bfloat16> = 1;

// Returns the first 8 significant bits of `rest`, a bf16 value. Truncated, not rounded, so that it cannot overflow.
// `rest` becomes the exact remainder, or 0 if it was infinite, since the term is then infinite.
__device__ inline uint32_t split_term(float& rest) {
    const uint32_t bits = __float_as_uint(rest) & 0xffff0000u;
    const float term = __uint_as_float(bits);
    rest = rest == term ? 0.0f : rest - term;
    return bits >> 16;
}

// Splits two values; a word has a term of each, with that of `low` in the lower half.
template <int kCount>
__device__ inline void split_terms(float low, float high, uint32_t (&words)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
        words[i] = split_term(low);
        words[i] |= split_term(high) << 16;
    }
}

__device__ inline void multiply(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __nv_bfloat16) {
    multiply_bf16(sum, a, b);
}
__device__ inline void multiply(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __half) {
    multiply_f16(sum, a, b);
}

}  // namespace peftk::cuda
