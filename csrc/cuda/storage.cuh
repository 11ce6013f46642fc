// The storage types on the device: exact widening, explicit rounding, and their bits.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace peftk::cuda {

__device__ inline float widen(float value) { return value; }
__device__ inline float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline float widen(__half value) { return __half2float(value); }

// How a storage type is rounded, and its bits, sign-extended, as a lane of the merge code. kMagnitude: all bits but the
// sign; kInfinity: the bits of infinity.
template <typename T>
struct Storage;

template <>
struct Storage<float> {
    static constexpr uint32_t kMagnitude = 0x7fffffff, kInfinity = 0x7f800000;
    static __device__ float round(float value) { return value; }
    static __device__ uint32_t bits(float value) { return __float_as_uint(value); }
    static __device__ float from_bits(uint32_t bits) { return __uint_as_float(bits); }
};

template <>
struct Storage<__nv_bfloat16> {
    static constexpr uint32_t kMagnitude = 0x7fff, kInfinity = 0x7f80;
    static __device__ __nv_bfloat16 round(float value) { return __float2bfloat16_rn(value); }
    static __device__ uint32_t bits(__nv_bfloat16 value) { return uint32_t(int32_t(__bfloat16_as_short(value))); }
    static __device__ __nv_bfloat16 from_bits(uint32_t bits) { return __ushort_as_bfloat16(uint16_t(bits)); }
};

template <>
struct Storage<__half> {
    static constexpr uint32_t kMagnitude = 0x7fff, kInfinity = 0x7c00;
    static __device__ __half round(float value) { return __float2half_rn(value); }
    static __device__ uint32_t bits(__half value) { return uint32_t(int32_t(__half_as_short(value))); }
    static __device__ __half from_bits(uint32_t bits) { return __ushort_as_half(uint16_t(bits)); }
};

}  // namespace peftk::cuda
