// AVX2, FMA and F16C: 8 floats per register, 16 registers.
#pragma once

#include <immintrin.h>

#include "common/dtype.h"

namespace peftk {
namespace PEFTK_LEVEL {

constexpr int W = 8;
typedef __m256 Vec;
constexpr int kRowsOfTwo = 6, kRowsOfThree = 0, kMaxVectors = 2, kBlockRows = 48, kDotTokens = 4, kDotRows = 3,
              kMaxDotTokens = 16, kStreams = 1;

PEFTK_INLINE Vec zero() { return _mm256_setzero_ps(); }
PEFTK_INLINE Vec set1(float x) { return _mm256_set1_ps(x); }
PEFTK_INLINE Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
PEFTK_INLINE Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
PEFTK_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
PEFTK_INLINE float reduce(Vec a) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

PEFTK_INLINE Vec load(const float* p) { return _mm256_loadu_ps(p); }
PEFTK_INLINE Vec widen(__m128i bits, bf16) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
PEFTK_INLINE Vec widen(__m128i bits, f16) { return _mm256_cvtph_ps(bits); }
PEFTK_INLINE Vec load(const bf16* p) { return widen(_mm_loadu_si128((const __m128i*)p), bf16{}); }
PEFTK_INLINE Vec load(const f16* p) { return widen(_mm_loadu_si128((const __m128i*)p), f16{}); }

PEFTK_INLINE Vec load_even(const bf16* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256((const __m256i*)p), 16));
}
PEFTK_INLINE Vec load_odd(const bf16* p) {
    return _mm256_castsi256_ps(_mm256_and_si256(_mm256_loadu_si256((const __m256i*)p), _mm256_set1_epi32(-65536)));
}

PEFTK_INLINE __m128i narrow(Vec v, bf16) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08));
}
PEFTK_INLINE __m128i narrow(Vec v, f16) { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }

PEFTK_INLINE void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
template <class T>
PEFTK_INLINE void store(T* p, Vec v) {
    _mm_storeu_si128((__m128i*)p, narrow(v, T{}));
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

// For packed weights (cpu/kernels/packed.h). A table of 16 floats is two registers.
PEFTK_INLINE Vec load(const int8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}
PEFTK_INLINE Vec set1(bf16 x) { return set1(to_float(x)); }
PEFTK_INLINE Vec set1(f16 x) { return _mm256_broadcastss_ps(_mm_cvtph_ps(_mm_cvtsi32_si128(x.bits))); }
typedef __m256i Codes4;
PEFTK_INLINE Codes4 load_codes(const uint8_t* p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
struct Lookup4 {
    Vec first, second;
    PEFTK_MEMBER Lookup4(const float* table, Vec scale)
        : first(_mm256_mul_ps(_mm256_loadu_ps(table), scale)),
          second(_mm256_mul_ps(_mm256_loadu_ps(table + 8), scale)) {}
    PEFTK_MEMBER Vec low(Codes4 codes) const {
        const Vec in_second = _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28));  // by the sign
        return _mm256_blendv_ps(_mm256_permutevar8x32_ps(first, codes), _mm256_permutevar8x32_ps(second, codes),
                                in_second);
    }
    PEFTK_MEMBER Vec high(Codes4 codes) const { return low(_mm256_srli_epi32(codes, 4)); }
};
struct Linear4 {
    Vec zero, scale;
    PEFTK_MEMBER explicit Linear4(Vec scale) : zero(_mm256_set1_ps(8)), scale(scale) {}
    PEFTK_MEMBER Linear4(Vec zero, Vec scale) : zero(zero), scale(scale) {}
    PEFTK_MEMBER Vec value(Codes4 code) const {
        return _mm256_mul_ps(_mm256_sub_ps(_mm256_cvtepi32_ps(code), zero), scale);
    }
    PEFTK_MEMBER Vec low(Codes4 codes) const { return value(_mm256_and_si256(codes, _mm256_set1_epi32(15))); }
    PEFTK_MEMBER Vec high(Codes4 codes) const { return value(_mm256_srli_epi32(codes, 4)); }
};
PEFTK_INLINE void zip(Vec even, Vec odd, Vec* to) {
    const Vec low = _mm256_unpacklo_ps(even, odd), high = _mm256_unpackhi_ps(even, odd);
    to[0] = _mm256_permute2f128_ps(low, high, 0x20);
    to[1] = _mm256_permute2f128_ps(low, high, 0x31);
}

PEFTK_INLINE void transpose(__m256* a, Vec* to) {
    __m256 b[8];
    for (int i = 0; i < 8; i += 2) {
        b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        a[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
        a[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xee);
        a[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
        a[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xee);
    }
    for (int i = 0; i < 4; i++) {
        to[i] = _mm256_permute2f128_ps(a[i], a[i + 4], 0x20);
        to[i + 4] = _mm256_permute2f128_ps(a[i], a[i + 4], 0x31);
    }
}
template <class T>
PEFTK_INLINE void transpose(const T* from, int64_t from_stride, Vec* to) {
    __m256 a[8];
    for (int i = 0; i < 8; i++) a[i] = load(from + i * from_stride);
    transpose(a, to);
}

// For the panels form (cpu/kernels/panels.h).
#define PEFTK_PANELS
#define PEFTK_FEW_ROWS
constexpr int kPanelRows = 6;
constexpr int64_t kDotTokens32 = 6, kDotTokens16 = 10;  // up to so many *dot* is faster, by the size of W's elements
// W rows from element `first` on, of which n are read, transposed.
template <class T>
PEFTK_INLINE void transpose_rows_of(const T* const* rows, int64_t first, int n, Vec* to) {
    __m256 a[8];
    if (n == W) {
        for (int i = 0; i < 8; i++) a[i] = load(rows[i] + first);
    } else {
        for (int i = 0; i < 8; i++) a[i] = load_n(rows[i] + first, n);
    }
    transpose(a, to);
}
// The same for 2W elements of each row, as pairs.
PEFTK_INLINE void transpose_pairs_of(const bf16* const* rows, int64_t first, Vec* to) {
    __m256 a[8];
    for (int i = 0; i < 8; i++) a[i] = _mm256_loadu_ps(reinterpret_cast<const float*>(rows[i] + first));
    transpose(a, to);
}
PEFTK_INLINE Vec widen_even(Vec pairs) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(pairs), 16));
}
PEFTK_INLINE Vec widen_odd(Vec pairs) { return _mm256_and_ps(pairs, _mm256_castsi256_ps(_mm256_set1_epi32(-65536))); }
// The compiler may neither load this again for each use nor move sums between registers: gcc 12 did both, in loops that
// then took half as long again.
PEFTK_INLINE Vec load_once(const float* p) {
    Vec value = load(p);
    asm("" : "+x"(value));
    return value;
}
PEFTK_INLINE void fma_in_place(Vec& sum, Vec a, Vec b) { asm("vfmadd231ps %1, %2, %0" : "+x"(sum) : "x"(a), "x"(b)); }

// For the transposed form (cpu/kernels/transposed.h): four steps of W rows need only four registers. The last four rows
// are the upper halves.
#define PEFTK_TRANSPOSES_STEPS
constexpr int kTransposedSteps = 4, kTransposedTokens = 6;
PEFTK_INLINE __m256 load_halves(const float* low, const float* high) {
    return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(low)), _mm_loadu_ps(high), 1);
}
PEFTK_INLINE __m256 load_halves(const f16* low, const f16* high) {
    const __m128i last = _mm_loadl_epi64((const __m128i*)high);
    return widen(_mm_unpacklo_epi64(_mm_loadl_epi64((const __m128i*)low), last), f16{});
}
PEFTK_INLINE __m256 load_halves(const bf16* low, const bf16* high) {  // of pairs
    const __m256i first = _mm256_castsi128_si256(_mm_loadu_si128((const __m128i*)low));
    return _mm256_castsi256_ps(_mm256_inserti128_si256(first, _mm_loadu_si128((const __m128i*)high), 1));
}
template <class T>
PEFTK_INLINE void transpose_steps(const T* from, int64_t from_stride, Vec* to) {
    __m256 a[4], b[4];
    for (int i = 0; i < 4; i++) a[i] = load_halves(from + i * from_stride, from + (i + 4) * from_stride);
    for (int i = 0; i < 4; i += 2) {
        b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
    }
    for (int i = 0; i < 2; i++) {
        to[2 * i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
        to[2 * i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xee);
    }
}

}  // namespace PEFTK_LEVEL
}  // namespace peftk
