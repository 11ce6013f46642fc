// AVX-512 F/BW/VL/DQ: 16 floats per register, 32 registers, masks. With AVX512_BF16 also its dot product of bf16 pairs.
#pragma once

#include <immintrin.h>

#include "common/dtype.h"

#if defined(__GNUC__) && !defined(__clang__)
// gcc's intrinsics pass registers that are undefined on purpose
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

namespace peftk {
namespace PEFTK_LEVEL {

constexpr int W = 16;
typedef __m512 Vec;
constexpr int kRowsOfTwo = 13, kRowsOfThree = 8, kMaxVectors = 3, kBlockRows = 104, kDotTokens = 4, kDotRows = 6,
              kMaxDotTokens = 16, kStreams = 8;

PEFTK_INLINE Vec zero() { return _mm512_setzero_ps(); }
PEFTK_INLINE Vec set1(float x) { return _mm512_set1_ps(x); }
PEFTK_INLINE Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
PEFTK_INLINE Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
PEFTK_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
PEFTK_INLINE float reduce(Vec a) { return _mm512_reduce_add_ps(a); }

PEFTK_INLINE Vec widen(__m256i bits, bf16) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
PEFTK_INLINE Vec widen(__m256i bits, f16) { return _mm512_cvtph_ps(bits); }

PEFTK_INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
template <class T>
PEFTK_INLINE Vec load(const T* p) {
    return widen(_mm256_loadu_si256((const __m256i*)p), T{});
}
PEFTK_INLINE Vec load_n(const float* p, int n) { return _mm512_maskz_loadu_ps((1u << n) - 1, p); }
template <class T>
PEFTK_INLINE Vec load_n(const T* p, int n) {
    return widen(_mm256_maskz_loadu_epi16((1u << n) - 1, p), T{});
}

// For packed weights (cpu/kernels/packed.h). A table of 16 floats is one register.
PEFTK_INLINE Vec load(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
PEFTK_INLINE Vec set1(bf16 x) { return set1(to_float(x)); }
PEFTK_INLINE Vec set1(f16 x) { return _mm512_cvtph_ps(_mm256_set1_epi16(short(x.bits))); }
typedef __m512i Codes4;
PEFTK_INLINE Codes4 load_codes(const uint8_t* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)); }
struct Lookup4 {
    Vec values;
    PEFTK_MEMBER Lookup4(const float* table, Vec scale) : values(_mm512_mul_ps(_mm512_loadu_ps(table), scale)) {}
    PEFTK_MEMBER Vec low(Codes4 codes) const { return _mm512_permutexvar_ps(codes, values); }
    PEFTK_MEMBER Vec high(Codes4 codes) const { return low(_mm512_srli_epi32(codes, 4)); }
};
struct Linear4 : Lookup4 {
    static constexpr float kMinusEight[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
    PEFTK_MEMBER explicit Linear4(Vec scale) : Lookup4(kMinusEight, scale) {}
    PEFTK_MEMBER Linear4(Vec zero, Vec scale) : Lookup4(kMinusEight, scale) {
        const Vec codes = _mm512_add_ps(_mm512_loadu_ps(kMinusEight), set1(8));
        values = _mm512_mul_ps(_mm512_sub_ps(codes, zero), scale);
    }
};
PEFTK_INLINE void zip(Vec even, Vec odd, Vec* to) {
    const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    to[0] = _mm512_permutex2var_ps(even, first, odd);
    to[1] = _mm512_permutex2var_ps(even, second, odd);
}

PEFTK_INLINE Vec load_even(const bf16* p) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16)); }
PEFTK_INLINE Vec load_odd(const bf16* p) {
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32(-65536)));
}

// With integer instructions, since vcvtneps2bf16 flushes subnormals.
PEFTK_INLINE __m256i narrow(Vec v, bf16) {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_blend_epi32(nan, rounded, quiet), 16));
}
PEFTK_INLINE __m256i narrow(Vec v, f16) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }

PEFTK_INLINE void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
template <class T>
PEFTK_INLINE void store(T* p, Vec v) {
    _mm256_storeu_si256((__m256i*)p, narrow(v, T{}));
}
PEFTK_INLINE void store_n(float* p, Vec v, int n) { _mm512_mask_storeu_ps(p, (1u << n) - 1, v); }
template <class T>
PEFTK_INLINE void store_n(T* p, Vec v, int n) {
    _mm256_mask_storeu_epi16(p, (1u << n) - 1, narrow(v, T{}));
}

PEFTK_INLINE void transpose(__m512* a, Vec* to) {
    __m512 b[16];
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {  // a[i + j], 128-bit lane l: column 4l + j of rows i … i + 3
        a[i] = _mm512_shuffle_ps(b[i], b[i + 2], 0x44);
        a[i + 1] = _mm512_shuffle_ps(b[i], b[i + 2], 0xee);
        a[i + 2] = _mm512_shuffle_ps(b[i + 1], b[i + 3], 0x44);
        a[i + 3] = _mm512_shuffle_ps(b[i + 1], b[i + 3], 0xee);
    }
    for (int j = 0; j < 4; j++) {  // a 4 x 4 transpose of lanes
        const __m512 low01 = _mm512_shuffle_f32x4(a[j], a[j + 4], 0x44),
                     high01 = _mm512_shuffle_f32x4(a[j], a[j + 4], 0xee);
        const __m512 low23 = _mm512_shuffle_f32x4(a[j + 8], a[j + 12], 0x44),
                     high23 = _mm512_shuffle_f32x4(a[j + 8], a[j + 12], 0xee);
        to[j] = _mm512_shuffle_f32x4(low01, low23, 0x88);
        to[j + 4] = _mm512_shuffle_f32x4(low01, low23, 0xdd);
        to[j + 8] = _mm512_shuffle_f32x4(high01, high23, 0x88);
        to[j + 12] = _mm512_shuffle_f32x4(high01, high23, 0xdd);
    }
}
template <class T>
PEFTK_INLINE void transpose(const T* from, int64_t from_stride, Vec* to) {
    __m512 a[16];
    for (int i = 0; i < 16; i++) a[i] = load(from + i * from_stride);
    transpose(a, to);
}

// For the panels form (cpu/kernels/panels.h).
#define PEFTK_PANELS
constexpr int kPanelRows = 14;
constexpr int64_t kDotTokens32 = 12, kDotTokens16 = 16;  // up to so many *dot* is faster, by the size of W's elements
template <class T>
PEFTK_INLINE void transpose_rows_of(const T* const* rows, int64_t first, int n, Vec* to) {
    __m512 a[16];
    if (n == W) {
        for (int i = 0; i < 16; i++) a[i] = load(rows[i] + first);
    } else {
        for (int i = 0; i < 16; i++) a[i] = load_n(rows[i] + first, n);
    }
    transpose(a, to);
}
// The same for 2W elements of each row, as pairs.
PEFTK_INLINE void transpose_pairs_of(const bf16* const* rows, int64_t first, Vec* to) {
    __m512 a[16];
    for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_ps(rows[i] + first);
    transpose(a, to);
}
PEFTK_INLINE Vec widen_even(Vec pairs) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(pairs), 16));
}
PEFTK_INLINE Vec widen_odd(Vec pairs) {
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(pairs), _mm512_set1_epi32(-65536)));
}
PEFTK_INLINE Vec load_once(const float* p) {
    Vec value = load(p);
    asm("" : "+v"(value));
    return value;
}
PEFTK_INLINE void fma_in_place(Vec& sum, Vec a, Vec b) { asm("vfmadd231ps %1, %2, %0" : "+v"(sum) : "v"(a), "v"(b)); }

#if defined(__AVX512BF16__)
#define PEFTK_DP 1
// The instruction treats subnormal inputs and sums as zero.
PEFTK_INLINE Vec dp(Vec acc, __m512i a, __m512i b) { return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b); }
PEFTK_INLINE __m512i load_pairs(const void* p) { return _mm512_loadu_si512(p); }
PEFTK_INLINE __m512i load_pairs_n(const bf16* p, int n) { return _mm512_maskz_loadu_epi16((1ull << n) - 1, p); }
PEFTK_INLINE __m512i set1_pair(uint32_t pair) { return _mm512_set1_epi32(int(pair)); }
PEFTK_INLINE void transpose_pairs(const bf16* from, int64_t from_stride, __m512i* to) {
    __m512 a[16], columns[16];
    for (int i = 0; i < 16; i++) a[i] = _mm512_castsi512_ps(load_pairs(from + i * from_stride));
    transpose(a, columns);
    for (int i = 0; i < 16; i++) to[i] = _mm512_castps_si512(columns[i]);
}
// Interleaves two rows of 16 bf16, at consecutive contraction indices, to 16 pairs.
PEFTK_INLINE __m512i interleave(__m256i even, __m256i odd) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
}
#endif

}  // namespace PEFTK_LEVEL
}  // namespace peftk
