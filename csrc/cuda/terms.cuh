// Exact products of any two storage types on the tensor cores.
//
// Two factors of one 16-bit type are multiplied as they are. Any others are cut into bf16 terms that add up to them
// exactly, 3 for fp32 (24 = 3 * 8 significant bits), 2 for fp16 (11 = 8 + 3), and every pair of terms is multiplied.
//
// Products are exact, sums are not: tensor cores align the products and the sum so far to the largest and cut what does
// not fit (Fasi et al., Numerical behavior of NVIDIA tensor cores, 2021). Over a long sum cuts add up, where roundings
// cancel. So kernels keep sums on the tensor cores short and add them up in fp32.
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

// The first 8 significant bits of `rest`, a bf16 value, cut and not rounded, so that it cannot overflow. `rest` keeps
// what is left: exact, and 0 where it was infinite, since then the term carries it.
__device__ inline uint32_t cut_term(float& rest) {
    const uint32_t bits = __float_as_uint(rest) & 0xffff0000u;
    const float term = __uint_as_float(bits);
    rest = rest == term ? 0.0f : rest - term;
    return bits >> 16;
}

// Two values as a word of each of their terms, `low` in the lower half.
template <int kCount>
__device__ inline void cut_terms(float low, float high, uint32_t (&words)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
        words[i] = cut_term(low);
        words[i] |= cut_term(high) << 16;
    }
}

__device__ inline void multiply(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __nv_bfloat16) {
    multiply_bf16(sum, a, b);
}
__device__ inline void multiply(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __half) {
    multiply_f16(sum, a, b);
}

}  // namespace peftk::cuda
