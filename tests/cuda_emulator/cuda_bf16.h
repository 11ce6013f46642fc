// bfloat16 as CUDA names it; see cuda_runtime.h.
#pragma once

#include "cuda_runtime.h"

struct __nv_bfloat16 {
    uint16_t bits;
};

inline short __bfloat16_as_short(__nv_bfloat16 value) { return short(value.bits); }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) { return {bits}; }

inline float __bfloat162float(__nv_bfloat16 value) { return __uint_as_float(unsigned(value.bits) << 16); }

// To nearest, ties to even: compares the 16 bits that are cut off with one half.
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
    if (std::isnan(value)) return {0x7fff};
    const unsigned bits = __float_as_uint(value), rest = bits & 0xffff, down = bits >> 16;
    const bool up = rest > 0x8000 || (rest == 0x8000 && down % 2 == 1);
    return {uint16_t(down + up)};
}
