// What a merge needs of a level's registers: a tile's size, rounding to a storage type and back, and the codes.
#pragma once

#include "common/merge.h"
#include "cpu/kernels/vec.h"

namespace peftk {
namespace PEFTK_LEVEL {
namespace {

// A tile's chains: enough to hide the latency of fma, and few enough for the registers.
constexpr int kVectors = W == 8 ? 2 : 4, kColumns = kVectors * W;
constexpr int kTileRows = W == 16 ? 4 : W == 8 ? 6 : 2;

// A register as lanes of 32 bits, of 16 or of 8.
typedef uint32_t Lanes __attribute__((vector_size(4 * W)));
typedef int32_t SignedLanes __attribute__((vector_size(4 * W)));
typedef uint16_t Lanes16 __attribute__((vector_size(4 * W)));
typedef int16_t SignedLanes16 __attribute__((vector_size(4 * W)));
// The codes of a register of weights of 32 bits, and of 16.
typedef int8_t Codes __attribute__((vector_size(W)));
typedef int8_t Codes16 __attribute__((vector_size(2 * W)));

template <class V>
PEFTK_INLINE V read(const void* from) {
    V v;
    memcpy(&v, from, sizeof v);
    return v;
}
template <class V>
PEFTK_INLINE void write(void* to, V v) {
    memcpy(to, &v, sizeof v);
}

// Whether any bit is set.
PEFTK_INLINE bool any(Lanes lanes) {
#if PEFTK_LEVEL_NUMBER == 1
    return !_mm256_testz_si256((__m256i)lanes, (__m256i)lanes);
#else
    const Lanes none{};
    return memcmp(&lanes, &none, sizeof lanes) != 0;
#endif
}

// A register of stored weights is kParts vectors of fp32, in the order that `order` says: `widen` and `round` convert.
// What is rounded must be below kLimit to be finite: the bits of the smallest magnitude that rounds to infinity.
template <class T>
struct Stored;

template <>
struct Stored<float> {
    static constexpr int kParts = 1;
    static constexpr int32_t kLimit = 0x7f800000;
    static constexpr uint32_t kMagnitude = 0x7fffffff;
    typedef uint32_t Lane;
    typedef Lanes Bits;

    PEFTK_INLINE void widen(Lanes bits, Vec* values) { values[0] = (Vec)bits; }
    PEFTK_INLINE Lanes round(const Vec* values) { return (Lanes)values[0]; }

    PEFTK_INLINE Lanes widen_codes(const int8_t* codes) {
#if PEFTK_LEVEL_NUMBER == 1
        return (Lanes)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)codes));
#else
        typedef int16_t Halves __attribute__((vector_size(2 * W)));  // in two steps, else gcc goes through memory
        return (Lanes) __builtin_convertvector(__builtin_convertvector(read<Codes>(codes), Halves), SignedLanes);
#endif
    }
};

struct Stored16 {
    static constexpr int kParts = 2;
    static constexpr uint16_t kMagnitude = 0x7fff;
    typedef uint16_t Lane;
    typedef Lanes16 Bits;

    PEFTK_INLINE Lanes16 widen_codes(const int8_t* codes) {
        return (Lanes16) __builtin_convertvector(read<Codes16>(codes), SignedLanes16);
    }
};

// The even columns are one vector and the odd ones the other: bf16 in the low and in the high halves of 32 bits.
template <>
struct Stored<bf16> : Stored16 {
    static constexpr int32_t kLimit = 0x7f7f8000;

    PEFTK_INLINE void order(const float* columns, float* to, int64_t count) {
        for (int64_t j = 0; j < count; j += 2 * W) {
            for (int64_t i = 0; i < W; i++) to[j + i] = columns[j + 2 * i], to[j + W + i] = columns[j + 2 * i + 1];
        }
    }
    PEFTK_INLINE void widen(Lanes16 bits, Vec* values) {
        values[0] = (Vec)((Lanes)bits << 16);
        values[1] = (Vec)((Lanes)bits & 0xffff0000);
    }
    PEFTK_INLINE Lanes16 round(const Vec* values) {
        Lanes rounded[2];
        for (int v = 0; v < 2; v++) {
            const Lanes bits = (Lanes)values[v];
            rounded[v] = bits + 0x7fff + (bits >> 16 & 1);
        }
        return (Lanes16)(rounded[0] >> 16 | (rounded[1] & 0xffff0000));
    }
};

template <>
struct Stored<f16> : Stored16 {
    static constexpr int32_t kLimit = 0x477ff000;

#if PEFTK_LEVEL_NUMBER == 1
    PEFTK_INLINE void widen(Lanes16 bits, Vec* values) {
        values[0] = peftk::PEFTK_LEVEL::widen(_mm256_castsi256_si128((__m256i)bits), f16{});
        values[1] = peftk::PEFTK_LEVEL::widen(_mm256_extracti128_si256((__m256i)bits, 1), f16{});
    }
    PEFTK_INLINE Lanes16 round(const Vec* values) {
        return (Lanes16)_mm256_set_m128i(narrow(values[1], f16{}), narrow(values[0], f16{}));
    }
#else
    // the compiler turns the copies through memory into moves between registers
    PEFTK_INLINE void widen(Lanes16 bits, Vec* values) {
        f16 stored[2 * W];
        memcpy(stored, &bits, sizeof stored);
        values[0] = load(stored), values[1] = load(stored + W);
    }
    PEFTK_INLINE Lanes16 round(const Vec* values) {
        f16 stored[2 * W];
        store(stored, values[0]), store(stored + W, values[1]);
        return read<Lanes16>(stored);
    }
#endif
};

// Writes the codes of kRows rows of a tile, code_stride bytes apart. Returns bits where a code is raw.
#if PEFTK_LEVEL_NUMBER == 1
// The codes of two rows fill a register. Narrowing saturates, which shows what has no code: it becomes 127, which is
// kRaw, or -128.
PEFTK_INLINE __m256i saturate(Lanes a, Lanes b) { return _mm256_packs_epi32((__m256i)a, (__m256i)b); }
PEFTK_INLINE __m256i pack_row(const Lanes* row) { return saturate(row[0], row[1]); }
PEFTK_INLINE __m256i pack_row(const Lanes16* row) { return (__m256i)row[0]; }
// Puts the lanes into the order of the columns, which narrowing has mixed: the first row, then the second.
PEFTK_INLINE __m256i sort_lanes(__m256i codes, Lanes) {
    return _mm256_permutevar8x32_epi32(codes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}
PEFTK_INLINE __m256i sort_lanes(__m256i codes, Lanes16) { return _mm256_permute4x64_epi64(codes, 0xd8); }

template <class T, int kRows>
PEFTK_INLINE Lanes encode(typename Stored<T>::Bits (*weight)[kVectors / Stored<T>::kParts],
                          typename Stored<T>::Bits (*back)[kVectors / Stored<T>::kParts], int8_t* code,
                          int64_t code_stride) {
    typedef Stored<T> S;
    typedef typename S::Bits Bits;
    constexpr int kRegisters = kVectors / S::kParts;
    static_assert(merge_code::kRaw == 127 && merge_code::kZero == -128 && merge_code::kFarthest == -127);
    __m256i distances[kRows], zeros[kRows];
    for (int n = 0; n < kRows; n++) {
        Bits distance[kRegisters], zero[kRegisters];
        for (int g = 0; g < kRegisters; g++) {
            distance[g] = merge_code::order<typename S::Lane, S::kMagnitude>(weight[n][g]) -
                          merge_code::order<typename S::Lane, S::kMagnitude>(back[n][g]);
            zero[g] = (Bits)(weight[n][g] == 0);
        }
        distances[n] = pack_row(distance), zeros[n] = pack_row(zero);
    }
    const __m256i distance = _mm256_packs_epi16(distances[0], distances[kRows - 1]);
    const __m256i zero = _mm256_packs_epi16(zeros[0], zeros[kRows - 1]);
    const __m256i lowest = _mm256_set1_epi8(merge_code::kZero), raw = _mm256_set1_epi8(merge_code::kRaw);
    const __m256i near = _mm256_xor_si256(distance, _mm256_cmpeq_epi8(distance, lowest));  // -128 becomes 127
    const __m256i codes = _mm256_blendv_epi8(near, lowest, zero);
    const __m256i sorted = sort_lanes(codes, Bits{});
    _mm_storeu_si128((__m128i*)code, _mm256_castsi256_si128(sorted));
    if (kRows == 2) _mm_storeu_si128((__m128i*)(code + code_stride), _mm256_extracti128_si256(sorted, 1));
    return (Lanes)_mm256_cmpeq_epi8(codes, raw);
}
#else
PEFTK_INLINE Codes narrow(Lanes lanes) {
    typedef int16_t Halves __attribute__((vector_size(2 * W)));  // in two steps, else gcc goes through memory
    return __builtin_convertvector(__builtin_convertvector((SignedLanes)lanes, Halves), Codes);
}
PEFTK_INLINE Codes16 narrow(Lanes16 lanes) { return __builtin_convertvector((SignedLanes16)lanes, Codes16); }

template <class T, int kRows>
PEFTK_INLINE Lanes encode(typename Stored<T>::Bits (*weight)[kVectors / Stored<T>::kParts],
                          typename Stored<T>::Bits (*back)[kVectors / Stored<T>::kParts], int8_t* code,
                          int64_t code_stride) {
    typedef Stored<T> S;
    typedef typename S::Bits Bits;
    Bits raw{};
    for (int n = 0; n < kRows; n++) {
        for (int g = 0; g < kVectors / S::kParts; g++) {
            const Bits lanes = merge_code::encode<typename S::Lane, S::kMagnitude>(weight[n][g], back[n][g]);
            raw |= (Bits)(lanes == typename S::Lane(merge_code::kRaw));
            write(code + n * code_stride + g * S::kParts * W, narrow(lanes));
        }
    }
    return (Lanes)raw;
}
#endif

}  // namespace
}  // namespace PEFTK_LEVEL
}  // namespace peftk
