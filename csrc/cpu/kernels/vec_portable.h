// 4 floats in the compiler's own vector type: SSE2, NEON or scalar code, depending on the architecture's baseline.
#pragma once

#include "common/dtype.h"

namespace peftk {
namespace PEFTK_LEVEL {

constexpr int W = 4;
typedef float Vec __attribute__((vector_size(16)));
// Tile sizes, limited by the registers for accumulators: rows x vectors of the outer-product kernel, tokens x rows of
// the dot-product kernel.
constexpr int kRowsOfTwo = 4, kRowsOfThree = 0, kMaxVectors = 2, kBlockRows = 64, kDotTokens = 2, kDotRows = 2,
              kMaxDotTokens = 8, kStreams = 1;

PEFTK_INLINE Vec zero() { return Vec{}; }
PEFTK_INLINE Vec set1(float x) { return Vec{x, x, x, x}; }
PEFTK_INLINE Vec add(Vec a, Vec b) { return a + b; }
PEFTK_INLINE Vec mul(Vec a, Vec b) { return a * b; }
PEFTK_INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }  // two roundings: the baseline may have no fma
PEFTK_INLINE float reduce(Vec a) { return (a[0] + a[2]) + (a[1] + a[3]); }

PEFTK_INLINE Vec load(const float* p) {
    Vec v;
    memcpy(&v, p, sizeof v);
    return v;
}
PEFTK_INLINE void store(float* p, Vec v) { memcpy(p, &v, sizeof v); }

template <class T>
PEFTK_INLINE Vec load(const T* p) {
    return Vec{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
}
PEFTK_INLINE Vec load_even(const bf16* p) {
    return Vec{to_float(p[0]), to_float(p[2]), to_float(p[4]), to_float(p[6])};
}
PEFTK_INLINE Vec load_odd(const bf16* p) { return Vec{to_float(p[1]), to_float(p[3]), to_float(p[5]), to_float(p[7])}; }

template <class T>
PEFTK_INLINE void store(T* p, Vec v) {
    for (int i = 0; i < W; i++) from_float(v[i], p + i);
}

template <class T>
PEFTK_INLINE Vec load_n(const T* p, int n) {
    Vec v{};
    for (int i = 0; i < n; i++) v[i] = to_float(p[i]);
    return v;
}
template <class T>
PEFTK_INLINE void store_n(T* p, Vec v, int n) {
    for (int i = 0; i < n; i++) from_float(v[i], p + i);
}

// For packed weights (cpu/kernels/packed.h).
PEFTK_INLINE Vec load(const int8_t* p) { return Vec{float(p[0]), float(p[1]), float(p[2]), float(p[3])}; }
PEFTK_INLINE Vec set1(bf16 x) { return set1(to_float(x)); }
PEFTK_INLINE Vec set1(f16 x) { return set1(to_float(x)); }
struct Codes4 {
    uint8_t code[W];
};
PEFTK_INLINE Codes4 load_codes(const uint8_t* p) {
    Codes4 codes;
    memcpy(codes.code, p, W);
    return codes;
}
struct Lookup4 {
    const float* table;
    Vec scale;
    PEFTK_MEMBER Lookup4(const float* table, Vec scale) : table(table), scale(scale) {}
    PEFTK_MEMBER Vec of(int a, int b, int c, int d) const {
        return Vec{table[a], table[b], table[c], table[d]} * scale;
    }
    PEFTK_MEMBER Vec low(Codes4 of_) const {
        const uint8_t* c = of_.code;
        return of(c[0] & 15, c[1] & 15, c[2] & 15, c[3] & 15);
    }
    PEFTK_MEMBER Vec high(Codes4 of_) const {
        const uint8_t* c = of_.code;
        return of(c[0] >> 4, c[1] >> 4, c[2] >> 4, c[3] >> 4);
    }
};
struct Linear4 {
    Vec zero, scale;
    PEFTK_MEMBER explicit Linear4(Vec scale) : zero(set1(8)), scale(scale) {}
    PEFTK_MEMBER Linear4(Vec zero, Vec scale) : zero(zero), scale(scale) {}
    PEFTK_MEMBER Vec low(Codes4 of_) const {
        const uint8_t* c = of_.code;
        return (Vec{float(c[0] & 15), float(c[1] & 15), float(c[2] & 15), float(c[3] & 15)} - zero) * scale;
    }
    PEFTK_MEMBER Vec high(Codes4 of_) const {
        const uint8_t* c = of_.code;
        return (Vec{float(c[0] >> 4), float(c[1] >> 4), float(c[2] >> 4), float(c[3] >> 4)} - zero) * scale;
    }
};
PEFTK_INLINE void zip(Vec even, Vec odd, Vec* to) {
    to[0] = Vec{even[0], odd[0], even[1], odd[1]}, to[1] = Vec{even[2], odd[2], even[3], odd[3]};
}

template <class T>
PEFTK_INLINE void transpose(const T* from, int64_t from_stride, Vec* to) {
    const T *r0 = from, *r1 = r0 + from_stride, *r2 = r1 + from_stride, *r3 = r2 + from_stride;
    for (int j = 0; j < W; j++) to[j] = Vec{to_float(r0[j]), to_float(r1[j]), to_float(r2[j]), to_float(r3[j])};
}

}  // namespace PEFTK_LEVEL
}  // namespace peftk
