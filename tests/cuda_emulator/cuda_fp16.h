// IEEE binary16 as CUDA names it; see cuda_runtime.h.
#pragma once

#include "cuda_runtime.h"

struct __half {
    uint16_t bits;
};

inline short __half_as_short(__half value) { return short(value.bits); }
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }

inline float __half2float(__half value) {
    const int exponent = value.bits >> 10 & 31, fraction = value.bits & 1023;
    float magnitude;
    if (exponent == 31) {
        magnitude = fraction ? NAN : INFINITY;
    } else if (exponent == 0) {
        magnitude = std::ldexp(float(fraction), -24);
    } else {
        magnitude = std::ldexp(float(1024 + fraction), exponent - 25);
    }
    return value.bits >> 15 ? -magnitude : magnitude;
}

// To nearest, ties to even, as std::nearbyint rounds the number of units in the last place.
inline __half __float2half_rn(float value) {
    const unsigned sign = std::signbit(value) ? 0x8000 : 0;
    const float magnitude = std::fabs(value);
    if (std::isnan(value)) return {0x7fff};
    if (magnitude >= 65520.0f) return {uint16_t(sign | 0x7c00)};
    const int exponent = magnitude == 0.0f ? -14 : std::max(-14, std::ilogb(magnitude));
    const unsigned units = unsigned(std::nearbyint(std::ldexp(double(magnitude), 10 - exponent)));
    return {uint16_t(sign | ((unsigned(exponent + 14) << 10) + units))};
}
