// AArch64 Advanced SIMD: 4 floats per register, 32 registers.
#pragma once

#include <arm_neon.h>

#include "common/dtype.h"

namespace peftk {
namespace PEFTK_LEVEL {

constexpr int W = 4;
typedef float32x4_t Vec;
constexpr int kRowsOfTwo = 10, kRowsOfThree = 8, kMaxVectors = 3, kBlockRows = 80;
constexpr int kDotTokens = 4, kDotRows = 4, kMaxDotTokens = 8, kStreams = 1;

PEFTK_INLINE Vec zero() { return vdupq_n_f32(0); }
PEFTK_INLINE Vec set1(float x) { return vdupq_n_f32(x); }
PEFTK_INLINE Vec add(Vec a, Vec b) { return vaddq_f32(a, b); }
PEFTK_INLINE Vec mul(Vec a, Vec b) { return vmulq_f32(a, b); }
PEFTK_INLINE Vec fma(Vec a, Vec b, Vec c) { return vfmaq_f32(c, a, b); }
PEFTK_INLINE float reduce(Vec a) { return vaddvq_f32(a); }

PEFTK_INLINE Vec load(const float* p) { return vld1q_f32(p); }
PEFTK_INLINE Vec load(const bf16* p) {
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p)), 16));
}
PEFTK_INLINE Vec load(const f16* p) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p))));
}

PEFTK_INLINE Vec load_even(const bf16* p) {
    return vreinterpretq_f32_u32(
        vshlq_n_u32(vreinterpretq_u32_u16(vld1q_u16(reinterpret_cast<const uint16_t*>(p))), 16));
}
PEFTK_INLINE Vec load_odd(const bf16* p) {
    const uint32x4_t bits = vreinterpretq_u32_u16(vld1q_u16(reinterpret_cast<const uint16_t*>(p)));
    return vreinterpretq_f32_u32(vandq_u32(bits, vdupq_n_u32(0xffff0000)));
}

PEFTK_INLINE uint16x4_t narrow(Vec v, bf16) {
    const uint32x4_t bits = vreinterpretq_u32_f32(v);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd);
    const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
    return vshrn_n_u32(vbslq_u32(vceqq_f32(v, v), rounded, quiet), 16);
}
PEFTK_INLINE uint16x4_t narrow(Vec v, f16) { return vreinterpret_u16_f16(vcvt_f16_f32(v)); }

PEFTK_INLINE void store(float* p, Vec v) { vst1q_f32(p, v); }
template <class T>
PEFTK_INLINE void store(T* p, Vec v) {
    vst1_u16(reinterpret_cast<uint16_t*>(p), narrow(v, T{}));
}

template <class T>
PEFTK_INLINE Vec load_n(const T* p, int n) {
    T full[W] = {};
    memcpy(full, p, n * sizeof(T));
    return load(full);
}
template <class T>
PEFTK_INLINE void store_n(T* p, Vec v, int n) {
    T full[W];
    store(full, v);
    memcpy(p, full, n * sizeof(T));
}

// For packed weights (cpu/kernels/packed.h). A table of 16 floats is four registers of bytes.
PEFTK_INLINE uint8x8_t load_four(const uint8_t* p) {
    uint32_t bits;
    memcpy(&bits, p, 4);
    return vcreate_u8(bits);
}
PEFTK_INLINE Vec load(const int8_t* p) {
    const int8x8_t bytes = vreinterpret_s8_u8(load_four(reinterpret_cast<const uint8_t*>(p)));
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(bytes))));
}
PEFTK_INLINE Vec set1(bf16 x) { return set1(to_float(x)); }
PEFTK_INLINE Vec set1(f16 x) { return vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(x.bits))); }
typedef uint32x4_t Codes4;
PEFTK_INLINE Codes4 load_codes(const uint8_t* p) { return vmovl_u16(vget_low_u16(vmovl_u8(load_four(p)))); }
struct Lookup4 {
    uint8x16x4_t values;
    PEFTK_MEMBER Lookup4(const float* table, Vec scale) {
        for (int i = 0; i < 4; i++) {
            values.val[i] = vreinterpretq_u8_f32(vmulq_f32(vld1q_f32(table + 4 * i), scale));
        }
    }
    PEFTK_MEMBER Vec of(Codes4 code) const {
        const uint32x4_t bytes = vmlaq_n_u32(vdupq_n_u32(0x03020100), code, 0x04040404);
        return vreinterpretq_f32_u8(vqtbl4q_u8(values, vreinterpretq_u8_u32(bytes)));
    }
    PEFTK_MEMBER Vec low(Codes4 codes) const { return of(vandq_u32(codes, vdupq_n_u32(15))); }
    PEFTK_MEMBER Vec high(Codes4 codes) const { return of(vshrq_n_u32(codes, 4)); }
};
struct Linear4 {
    Vec zero, scale;
    PEFTK_MEMBER explicit Linear4(Vec scale) : zero(vdupq_n_f32(8)), scale(scale) {}
    PEFTK_MEMBER Linear4(Vec zero, Vec scale) : zero(zero), scale(scale) {}
    PEFTK_MEMBER Vec value(Codes4 code) const { return vmulq_f32(vsubq_f32(vcvtq_f32_u32(code), zero), scale); }
    PEFTK_MEMBER Vec low(Codes4 codes) const { return value(vandq_u32(codes, vdupq_n_u32(15))); }
    PEFTK_MEMBER Vec high(Codes4 codes) const { return value(vshrq_n_u32(codes, 4)); }
};
PEFTK_INLINE void zip(Vec even, Vec odd, Vec* to) { to[0] = vzip1q_f32(even, odd), to[1] = vzip2q_f32(even, odd); }

template <class T>
PEFTK_INLINE void transpose(const T* from, int64_t from_stride, Vec* to) {
    const Vec r0 = load(from), r1 = load(from + from_stride);
    const Vec r2 = load(from + 2 * from_stride), r3 = load(from + 3 * from_stride);
    const float64x2_t a = vreinterpretq_f64_f32(vtrn1q_f32(r0, r1)), b = vreinterpretq_f64_f32(vtrn2q_f32(r0, r1));
    const float64x2_t c = vreinterpretq_f64_f32(vtrn1q_f32(r2, r3)), d = vreinterpretq_f64_f32(vtrn2q_f32(r2, r3));
    to[0] = vreinterpretq_f32_f64(vtrn1q_f64(a, c));
    to[1] = vreinterpretq_f32_f64(vtrn1q_f64(b, d));
    to[2] = vreinterpretq_f32_f64(vtrn2q_f64(a, c));
    to[3] = vreinterpretq_f32_f64(vtrn2q_f64(b, d));
}

}  // namespace PEFTK_LEVEL
}  // namespace peftk
