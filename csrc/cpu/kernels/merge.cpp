// W' = round(fl(W + d)) and back, with d = fl(s * BA) in one fixed chain of roundings (docs/merge.md): one pass over W.
//
// A register tile holds the chains of a few rows and kColumns columns; when the rank has gone by, d, W', W″ and the
// code follow without leaving the registers. Every multiply-add below is an explicit fma and, under
// -ffp-contract=off, nothing else becomes one.

#include "cpu/merge.h"

#include "cpu/kernels/vec.h"
#include "cpu/scratch.h"

namespace peftk {
namespace PEFTK_LEVEL {
namespace {

// A tile's chains: enough in flight to hide the latency of an fma, few enough for the registers.
constexpr int kVectors = W == 8 ? 2 : 4, kColumns = kVectors * W;
constexpr int kTileRows = W == 16 ? 4 : W == 8 ? 6 : 2;
// A's share of the second-level cache: a panel of column groups that all rows of a task use before the next.
constexpr int64_t kPanelFloats = 1 << 13;

PEFTK_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
PEFTK_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

typedef uint32_t Lanes __attribute__((vector_size(4 * W)));
typedef int32_t SignedLanes __attribute__((vector_size(4 * W)));
typedef int16_t Halves __attribute__((vector_size(2 * W)));
typedef int8_t Codes __attribute__((vector_size(W)));

// fl(b * a + t), which the baseline of an architecture may have in software only.
PEFTK_INLINE Vec exact_fma(Vec b, Vec a, Vec t) {
#if PEFTK_LEVEL_NUMBER == 0
    for (int i = 0; i < W; i++) t[i] = __builtin_fmaf(b[i], a[i], t[i]);
    return t;
#else
    return fma(b, a, t);
#endif
}

// Between lanes of 32 bits and of 8 by way of 16, which compilers know how to do in registers.
PEFTK_INLINE Codes to_codes(Lanes lanes) {
    return __builtin_convertvector(__builtin_convertvector((SignedLanes)lanes, Halves), Codes);
}
PEFTK_INLINE Lanes to_lanes(Codes codes) {
    return (Lanes) __builtin_convertvector(__builtin_convertvector(codes, Halves), SignedLanes);
}

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

// A register of weights, `Bits`: how it is read, written, widened and rounded to, and how it reads as lanes of the
// code.
template <class T>
struct Stored;

template <>
struct Stored<float> {
    static constexpr uint32_t kMagnitude = 0x7fffffff;
    typedef Lanes Bits;

    PEFTK_INLINE Bits load(const float* from) { return read<Lanes>(from); }
    PEFTK_INLINE void store(float* to, Bits bits) { write(to, bits); }
    PEFTK_INLINE Vec widen(Bits bits) { return (Vec)bits; }
    PEFTK_INLINE Bits round(Vec v) { return (Lanes)v; }
    PEFTK_INLINE Lanes lanes(Bits bits) { return bits; }
    PEFTK_INLINE Bits bits(Lanes lanes) { return lanes; }
};

// In registers a bf16 is the upper half of a 32-bit lane, which makes widening free.
template <>
struct Stored<bf16> {
    static constexpr uint32_t kMagnitude = 0x7fff;
    typedef Lanes Bits;

    PEFTK_INLINE Bits load(const bf16* from) {
        return (Lanes) __builtin_convertvector(read<Halves>(from), SignedLanes) << 16;
    }
    PEFTK_INLINE void store(bf16* to, Bits bits) {
        write(to, __builtin_convertvector((SignedLanes)(bits >> 16), Halves));
    }
    PEFTK_INLINE Vec widen(Bits bits) { return (Vec)bits; }
    PEFTK_INLINE Bits round(Vec v) {
        const Lanes bits = (Lanes)v;
        const Lanes rounded = bits + 0x7fff + (bits >> 16 & 1);
        return (v == v ? rounded : bits | 0x400000) & 0xffff0000;
    }
    PEFTK_INLINE Lanes lanes(Bits bits) { return (Lanes)((SignedLanes)bits >> 16); }
    PEFTK_INLINE Bits bits(Lanes lanes) { return lanes << 16; }
};

// The copies through arrays are moves between registers to the compiler.
template <>
struct Stored<f16> {
    static constexpr uint32_t kMagnitude = 0x7fff;
    typedef Halves Bits;

    PEFTK_INLINE Bits load(const f16* from) { return read<Halves>(from); }
    PEFTK_INLINE void store(f16* to, Bits bits) { write(to, bits); }
    PEFTK_INLINE Vec widen(Bits bits) {
        f16 stored[W];
        write(stored, bits);
        return PEFTK_LEVEL::load(stored);
    }
    PEFTK_INLINE Bits round(Vec v) {
        f16 stored[W];
        PEFTK_LEVEL::store(stored, v);
        return read<Halves>(stored);
    }
    PEFTK_INLINE Lanes lanes(Bits bits) { return (Lanes) __builtin_convertvector(bits, SignedLanes); }
    PEFTK_INLINE Bits bits(Lanes lanes) { return __builtin_convertvector((SignedLanes)lanes, Halves); }
};

template <class T>
PEFTK_INLINE void merge_vector(const T* weight, T* out, int8_t* code, Vec d) {
    using S = Stored<T>;
    const auto w = S::load(weight);
    const auto merged = S::round(S::widen(w) + d);
    const auto back = S::round(S::widen(merged) - d);
    S::store(out, merged);
    write(code, to_codes(merge_code::encode<S::kMagnitude>(S::lanes(w), S::lanes(back))));
}

template <class T>
PEFTK_INLINE void unmerge_vector(const T* merged, T* out, const int8_t* code, Vec d) {
    using S = Stored<T>;
    const auto back = S::round(S::widen(S::load(merged)) - d);
    const Lanes stored = to_lanes(read<Codes>(code));
    S::store(out, S::bits(merge_code::decode<S::kMagnitude>(S::lanes(back), stored)));
}

template <class T, bool kUnmerge>
PEFTK_INLINE void finish(const T* weight, T* out, int8_t* code, Vec d) {
    if constexpr (kUnmerge) {
        unmerge_vector(weight, out, code, d);
    } else {
        merge_vector(weight, out, code, d);
    }
}

// The same for the first n < W columns, through copies of whole vectors.
template <class T, bool kUnmerge>
static void finish_n(const T* weight, T* out, int8_t* code, Vec d, int n) {
    T weights[W] = {};
    int8_t codes[W] = {};
    memcpy(weights, weight, n * sizeof(T));
    if (kUnmerge) memcpy(codes, code, n);
    finish<T, kUnmerge>(weights, weights, codes, d);
    memcpy(out, weights, n * sizeof(T));
    if (!kUnmerge) memcpy(code, codes, n);
}

// kRows rows and kColumns columns; `a` is packed A [R][kMergeGroup] from the tile's first column, `b` the rows of B
// [kRows][R] in fp32.
template <class T, bool kUnmerge, int kRows>
PEFTK_INLINE void tile(const MergeArgs& args, const float* a, const float* b, int64_t row, int64_t column) {
    Vec chain[kRows][kVectors];
    for (int i = 0; i < kRows; i++) {
        for (int v = 0; v < kVectors; v++) chain[i][v] = zero();
    }
    for (int64_t r = 0; r < args.R; r++) {
        Vec panel[kVectors];
        for (int v = 0; v < kVectors; v++) panel[v] = load(a + r * kMergeGroup + v * W);
        for (int i = 0; i < kRows; i++) {
            const Vec factor = set1(b[i * args.R + r]);
            for (int v = 0; v < kVectors; v++) chain[i][v] = exact_fma(factor, panel[v], chain[i][v]);
        }
    }
    const Vec scaling = set1(args.scaling);
    for (int i = 0; i < kRows; i++) {
        const T* weight = static_cast<const T*>(args.weight) + (row + i) * args.weight_stride + column;
        T* out = static_cast<T*>(args.out) + (row + i) * args.out_stride + column;
        int8_t* code = args.code + (row + i) * args.K + column;
        for (int v = 0; v < kVectors; v++) {
            const Vec d = mul(scaling, chain[i][v]);
            const int64_t left = args.K - column - v * W;
            if (left >= W) {
                finish<T, kUnmerge>(weight + v * W, out + v * W, code + v * W, d);
            } else if (left > 0) {
                finish_n<T, kUnmerge>(weight + v * W, out + v * W, code + v * W, d, int(left));
            }
        }
    }
}

template <class T, bool kUnmerge, int kRows>
static void row_of_tiles(const MergeArgs& args, const float* packed, const float* b, int64_t row, int64_t first_group,
                         int64_t last_group) {
    for (int64_t g = first_group; g < last_group; g++) {
        const float* group = packed + g * args.R * kMergeGroup;
        for (int64_t c = 0; c < kMergeGroup && g * kMergeGroup + c < args.K; c += kColumns) {
            tile<T, kUnmerge, kRows>(args, group + c, b, row, g * kMergeGroup + c);
        }
    }
}

template <class T, bool kUnmerge>
static void rows_of(const MergeArgs& args, const float* packed, int64_t first_row, int64_t rows, const float* b) {
    const int64_t groups = (args.K + kMergeGroup - 1) / kMergeGroup;
    const int64_t panel = larger(1, kPanelFloats / (args.R * kMergeGroup));
    for (int64_t first = 0; first < groups; first += panel) {
        const int64_t last = smaller(first + panel, groups);
        int64_t i = 0;
        for (; i + kTileRows <= rows; i += kTileRows) {
            row_of_tiles<T, kUnmerge, kTileRows>(args, packed, b + i * args.R, first_row + i, first, last);
        }
        for (; i < rows; i++) {
            row_of_tiles<T, kUnmerge, 1>(args, packed, b + i * args.R, first_row + i, first, last);
        }
    }
}

template <class Adapter>
static void widen(const void* from, float* to, int64_t count) {
    const Adapter* values = static_cast<const Adapter*>(from);
    for (int64_t i = 0; i < count; i++) to[i] = to_float(values[i]);
}

// `offset` in elements of the adapter's dtype.
static void widen(const void* adapter, Dtype dtype, int64_t offset, float* to, int64_t count) {
    const void* from = static_cast<const char*>(adapter) + offset * size_of(dtype);
    switch (dtype) {
        case kFloat32: widen<float>(from, to, count); break;
        case kBFloat16: widen<bf16>(from, to, count); break;
        case kFloat16: widen<f16>(from, to, count); break;
    }
}

template <bool kUnmerge>
static void rows_of(const MergeArgs& args, const float* packed, int64_t first_row, int64_t rows) {
    float* b = static_cast<float*>(scratch(kRowsSlot, rows * args.R * sizeof(float)));
    widen(args.lora_B, args.adapter_dtype, first_row * args.R, b, rows * args.R);
    switch (args.weight_dtype) {
        case kFloat32: rows_of<float, kUnmerge>(args, packed, first_row, rows, b); break;
        case kBFloat16: rows_of<bf16, kUnmerge>(args, packed, first_row, rows, b); break;
        case kFloat16: rows_of<f16, kUnmerge>(args, packed, first_row, rows, b); break;
    }
}

}  // namespace

void merge_pack(const MergeArgs& args, int64_t group, float* packed) {
    const int64_t column = group * kMergeGroup, columns = smaller(kMergeGroup, args.K - column);
    for (int64_t r = 0; r < args.R; r++) {
        float* to = packed + (group * args.R + r) * kMergeGroup;
        widen(args.lora_A, args.adapter_dtype, r * args.K + column, to, columns);
        for (int64_t j = columns; j < kMergeGroup; j++) to[j] = 0;
    }
}

void merge_rows(const MergeArgs& args, const float* packed, int64_t first_row, int64_t rows) {
    rows_of<false>(args, packed, first_row, rows);
}

void unmerge_rows(const MergeArgs& args, const float* packed, int64_t first_row, int64_t rows) {
    rows_of<true>(args, packed, first_row, rows);
}

}  // namespace PEFTK_LEVEL
}  // namespace peftk
