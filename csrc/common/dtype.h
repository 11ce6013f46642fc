// The three storage types and their exact conversions. The codes agree with peftk/backends/cpu.py.
//
// Everything here is `static`, because kernels are compiled once per SIMD level. With external linkage, the linker
// might keep the copy of an inline function that was compiled for AVX-512, and use it at every level.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/host_device.h"

namespace peftk {

enum Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

static inline PEFTK_HOST_DEVICE int64_t size_of(int dtype) { return dtype == kFloat32 ? 4 : 2; }

static inline float bits_to_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline uint32_t float_to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

static inline float to_float(float value) { return value; }

static inline float to_float(bf16 value) { return bits_to_float(uint32_t(value.bits) << 16); }

static inline float to_float(f16 value) {
    const uint32_t sign = uint32_t(value.bits & 0x8000) << 16, magnitude = value.bits & 0x7fff;
    if (magnitude >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);  // inf, nan
    // Read with fp32's exponent bias, the number is 2^112 times too small. The product is exact, also for subnormals.
    const float scaled = bits_to_float(magnitude << 13) * 0x1p112f;
    return bits_to_float(sign | float_to_bits(scaled));
}

// Rounds to nearest, ties to even, also to subnormals; NaN stays NaN.
static inline void from_float(float value, float* out) { *out = value; }

static inline void from_float(float value, bf16* out) {
    const uint32_t bits = float_to_bits(value);
    const bool nan = (bits & 0x7fffffff) > 0x7f800000;
    out->bits = uint16_t(nan ? (bits >> 16) | 0x40 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static inline void from_float(float value, f16* out) {
    const uint32_t bits = float_to_bits(value), magnitude = bits & 0x7fffffff;
    uint32_t result;
    if (magnitude > 0x7f800000) {
        result = 0x7e00;
    } else if (magnitude >= 0x47800000) {  // 2^16 and more
        result = 0x7c00;
    } else if (magnitude < 0x38800000) {  // below the smallest normal number: adding 1/2 rounds at 2^-24
        result = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000;
    } else {
        result = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    }
    out->bits = uint16_t((bits >> 16 & 0x8000) | result);
}

}  // namespace peftk
