// W' = round(fl(W + d)) and back, with d in one fixed chain of roundings (docs/merge.md): one pass over W, in place.
//
// A task's rows are processed in blocks, as high as one register tile and as wide as a panel. A block is copied to a
// buffer in the L1 cache. There the arithmetic (chains of fma in registers, then W' and W″) and then the code (integers
// only, on vectors of W's own width) are computed. The block is copied back once all of it is known to be finite. Every
// multiply-add below is an explicit fma; with -ffp-contract=off no other operations are contracted.

#include "cpu/merge.h"

#include "cpu/kernels/vec.h"
#include "cpu/scratch.h"

namespace peftk {
namespace PEFTK_LEVEL {
namespace {

// A tile's chains: enough to hide the latency of fma, and few enough for the registers.
constexpr int kVectors = W == 8 ? 2 : 4, kColumns = kVectors * W;
constexpr int kTileRows = W == 16 ? 4 : W == 8 ? 6 : 2;
// A panel: its part of A stays in the L1 cache while all rows of a task use it.
constexpr int64_t kPanelFloats = 1 << 13, kPanelColumns = 512;
static_assert(kMergeTaskRows % kTileRows == 0 && kMergeGroup % kColumns == 0 && kPanelColumns % kMergeGroup == 0);

PEFTK_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
PEFTK_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

typedef uint32_t Lanes __attribute__((vector_size(4 * W)));
typedef int32_t SignedLanes __attribute__((vector_size(4 * W)));
typedef int16_t Halves __attribute__((vector_size(2 * W)));
typedef int8_t Codes __attribute__((vector_size(W)));
// The same register as lanes of 16 bits.
typedef uint16_t Lanes16 __attribute__((vector_size(4 * W)));
typedef int16_t SignedLanes16 __attribute__((vector_size(4 * W)));
typedef int8_t Codes16 __attribute__((vector_size(2 * W)));

// fl(b * a + t). An architecture's baseline may have it only in software.
PEFTK_INLINE Vec exact_fma(Vec b, Vec a, Vec t) {
#if PEFTK_LEVEL_NUMBER == 0
    for (int i = 0; i < W; i++) t[i] = __builtin_fmaf(b[i], a[i], t[i]);
    return t;
#else
    return fma(b, a, t);
#endif
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

// Copies a few hundred bytes. gcc would turn the loop into memcpy and that into "rep movs", which starts too slowly.
// The asm, which might change memory, prevents this.
PEFTK_INLINE void copy(void* to, const void* from, int64_t bytes) {
    char* const t = static_cast<char*>(to);
    const char* const f = static_cast<const char*>(from);
    int64_t i = 0;
    for (; i + int64_t(sizeof(Lanes)) <= bytes; i += sizeof(Lanes)) {
        write(t + i, read<Lanes>(f + i));
        asm volatile("" ::: "memory");
    }
    for (; i < bytes; i++) t[i] = f[i];
}

// How values of a storage type are rounded, and how their bits become lanes of the code. `round_to` writes a register
// of rounded values and returns them widened again. Results must be finite, that is below kLimit: the bits of the
// smallest magnitude that rounds to infinity.
template <class T>
struct Stored;

template <>
struct Stored<float> {
    static constexpr int32_t kLimit = 0x7f800000;
    static constexpr uint32_t kMagnitude = 0x7fffffff;
    typedef uint32_t Lane;
    typedef Lanes Bits;
    typedef Codes Code;

    PEFTK_INLINE Vec round_to(float* to, Vec v) {
        store(to, v);
        return v;
    }
    // between 32 and 8 bits in two steps, for which compilers use registers only
    PEFTK_INLINE Codes narrow(Lanes lanes) {
        return __builtin_convertvector(__builtin_convertvector((SignedLanes)lanes, Halves), Codes);
    }
    PEFTK_INLINE Lanes widen(Codes codes) {
        return (Lanes) __builtin_convertvector(__builtin_convertvector(codes, Halves), SignedLanes);
    }
};

struct Stored16 {
    static constexpr uint16_t kMagnitude = 0x7fff;
    typedef uint16_t Lane;
    typedef Lanes16 Bits;
    typedef Codes16 Code;

    PEFTK_INLINE Codes16 narrow(Lanes16 lanes) { return __builtin_convertvector((SignedLanes16)lanes, Codes16); }
    PEFTK_INLINE Lanes16 widen(Codes16 codes) { return (Lanes16) __builtin_convertvector(codes, SignedLanes16); }
};

template <>
struct Stored<bf16> : Stored16 {
    static constexpr int32_t kLimit = 0x7f7f8000;

    PEFTK_INLINE Vec round_to(bf16* to, Vec v) {
        const Lanes bits = (Lanes)v, rounded = bits + 0x7fff + (bits >> 16 & 1);
        write(to, __builtin_convertvector((SignedLanes)(rounded >> 16), Halves));
        return (Vec)(rounded & 0xffff0000);
    }
};

template <>
struct Stored<f16> : Stored16 {
    static constexpr int32_t kLimit = 0x477ff000;

    // the compiler turns the copy through memory into a move between registers
    PEFTK_INLINE Vec round_to(f16* to, Vec v) {
        f16 stored[W];
        store(stored, v);
        memcpy(to, stored, sizeof stored);
        return load(stored);
    }
};

// The buffers of a block, padded to whole tiles: W (or W' when unmerging), the new W', W″, and the codes.
template <class T>
struct Block {
    alignas(64) T weight[kTileRows][kPanelColumns];
    alignas(64) T merged[kTileRows][kPanelColumns];
    alignas(64) T back[kTileRows][kPanelColumns];
    alignas(64) int8_t code[kTileRows][kPanelColumns];
};

// kRows rows and kColumns columns of one adapter's chains, from rank r up to `end`. `a` is packed A from the tile's
// first column, `b` the rows of B [kRows][R] in fp32.
template <int kRows>
PEFTK_INLINE void chains(const float* a, const float* b, int64_t R, int64_t r, int64_t end, Vec (*chain)[kVectors]) {
    for (int i = 0; i < kRows; i++) {
        for (int v = 0; v < kVectors; v++) chain[i][v] = zero();
    }
    for (; r < end; r++) {
        Vec panel[kVectors];
        for (int v = 0; v < kVectors; v++) panel[v] = load(a + r * kMergeGroup + v * W);
        for (int i = 0; i < kRows; i++) {
            const Vec factor = set1(b[i * R + r]);
            for (int v = 0; v < kVectors; v++) chain[i][v] = exact_fma(factor, panel[v], chain[i][v]);
        }
    }
}

// d of a tile: the scaled chains of all adapters, added in order.
template <int kRows>
PEFTK_INLINE void deltas(const MergeFactors& factors, const float* a, const float* b, Vec (*d)[kVectors]) {
    chains<kRows>(a, b, factors.R, 0, factors.ends[0], d);
    const Vec scaling = set1(factors.scaling[0]);
    for (int i = 0; i < kRows; i++) {
        for (int v = 0; v < kVectors; v++) d[i][v] = mul(scaling, d[i][v]);
    }
    for (int64_t t = 1; t < factors.adapters; t++) {
        Vec chain[kRows][kVectors];
        chains<kRows>(a, b, factors.R, factors.ends[t - 1], factors.ends[t], chain);
        const Vec scaling = set1(factors.scaling[t]);
        for (int i = 0; i < kRows; i++) {
            for (int v = 0; v < kVectors; v++) d[i][v] = add(d[i][v], mul(scaling, chain[i][v]));
        }
    }
}

// Computes W' and W″ of a block from W, or W″ from W' (kUnmerge). Returns whether all W' are finite. `ahead` is the
// next block of W, to be prefetched: its rows are too far apart for the processor's own prefetching.
template <class T, bool kUnmerge, int kRows>
static bool round_block(const MergeSide& side, const float* b, int64_t column, int64_t columns, Block<T>& block,
                        const T* ahead, int64_t stride) {
    typedef Stored<T> S;
    SignedLanes largest{};
    for (int64_t c = 0; c < columns; c += kColumns) {
        const int64_t at = column + c;
        const float* a = side.packed + (at / kMergeGroup * side.factors.R) * kMergeGroup + at % kMergeGroup;
        Vec d[kRows][kVectors];
        deltas<kRows>(side.factors, a, b, d);
        for (int i = 0; i < kRows; i++) {
            for (size_t byte = 0; byte < kColumns * sizeof(T); byte += 64) {
                __builtin_prefetch(reinterpret_cast<const char*>(ahead + i * stride + c) + byte);
            }
            for (int v = 0; v < kVectors; v++) {
                const int64_t j = c + v * W;
                Vec merged = load(&block.weight[i][j]);
                if (!kUnmerge) {
                    const Vec sum = merged + d[i][v];
                    const SignedLanes magnitude = (SignedLanes)sum & 0x7fffffff;
                    largest = magnitude > largest ? magnitude : largest;
                    merged = S::round_to(&block.merged[i][j], sum);
                }
                S::round_to(&block.back[i][j], merged - d[i][v]);
            }
        }
    }
    int32_t most = 0;
    for (int l = 0; l < W; l++) most = most > largest[l] ? most : largest[l];
    return most < S::kLimit;
}

// Computes the codes of a block from W and W″. Returns whether any of them is raw.
template <class T, int kRows>
static bool encode_block(int64_t columns, Block<T>& block) {
    typedef Stored<T> S;
    typename S::Code raw{};
    for (int i = 0; i < kRows; i++) {
        for (int64_t j = 0; j < columns; j += sizeof(typename S::Code)) {
            const auto weight = read<typename S::Bits>(&block.weight[i][j]);
            const auto back = read<typename S::Bits>(&block.back[i][j]);
            const auto code = S::narrow(merge_code::encode<typename S::Lane, S::kMagnitude>(weight, back));
            raw |= code == int8_t(merge_code::kRaw);
            write(&block.code[i][j], code);
        }
    }
    const typename S::Code none{};
    return memcmp(&raw, &none, sizeof raw) != 0;
}

// Computes W of a block from W″ and the codes.
template <class T, int kRows>
static void decode_block(int64_t columns, Block<T>& block) {
    typedef Stored<T> S;
    for (int i = 0; i < kRows; i++) {
        for (int64_t j = 0; j < columns; j += sizeof(typename S::Code)) {
            const auto back = read<typename S::Bits>(&block.back[i][j]);
            const auto code = S::widen(read<typename S::Code>(&block.code[i][j]));
            write(&block.weight[i][j], merge_code::decode<typename S::Lane, S::kMagnitude>(back, code));
        }
    }
}

PEFTK_INLINE void set_bits(float* to, uint32_t bits) { *to = bits_to_float(bits); }
PEFTK_INLINE void set_bits(bf16* to, uint32_t bits) { to->bits = uint16_t(bits); }
PEFTK_INLINE void set_bits(f16* to, uint32_t bits) { to->bits = uint16_t(bits); }
PEFTK_INLINE uint32_t bits_of(float value) { return float_to_bits(value); }
PEFTK_INLINE uint32_t bits_of(bf16 value) { return value.bits; }
PEFTK_INLINE uint32_t bits_of(f16 value) { return value.bits; }

// Shared by a task's blocks: the widened rows of B, and each row's next raw weight of `from`.
struct Rows {
    const float* b_from;
    const float* b_to;
    const RawWeight* next[kMergeTaskRows];
};

// Merges one block: rows i … i + kRows - 1 of the task. Returns false, with W unchanged, if it would not be finite.
template <class T, int kRows>
static bool merge_block(const MergePass& pass, MergeTask& task, Rows& rows, int64_t i, int64_t column,
                        int64_t columns) {
    const int64_t first = task.first_row + i, padded = (columns + kMergeGroup - 1) / kMergeGroup * kMergeGroup;
    T* const weight = static_cast<T*>(pass.weight) + first * pass.stride + column;
    const T* const ahead = i + kRows < task.rows ? weight + kRows * pass.stride : weight - i * pass.stride + columns;
    const size_t bytes = columns * sizeof(T);
    Block<T> block;
    for (int n = 0; n < kRows; n++) {
        copy(block.weight[n], weight + n * pass.stride, bytes);
        for (int64_t j = columns; j < padded; j++) block.weight[n][j] = T{};
    }
    if (pass.from.factors.adapters) {
        for (int n = 0; n < kRows; n++) {
            copy(block.code[n], task.code_from + (i + n) * pass.code_stride + column, columns);
            for (int64_t j = columns; j < padded; j++) block.code[n][j] = 0;
        }
        round_block<T, true, kRows>(pass.from, rows.b_from + i * pass.from.factors.R, column, padded, block, ahead,
                                    pass.stride);
        decode_block<T, kRows>(padded, block);
        for (int n = 0; n < kRows; n++) {
            const int64_t start = (first + n) * pass.K + column;
            const RawWeight*& raw = rows.next[i + n];
            for (; raw < task.raws_from_end && raw->index < start + columns; raw++) {
                set_bits(&block.weight[n][raw->index - start], raw->bits);
            }
        }
    }
    if (pass.to.factors.adapters) {
        if (!round_block<T, false, kRows>(pass.to, rows.b_to + i * pass.to.factors.R, column, padded, block, ahead,
                                          pass.stride))
            return false;
        const bool raws = encode_block<T, kRows>(padded, block);
        for (int n = 0; n < kRows && raws && !pass.undoing; n++) {
            const int8_t *code = block.code[n], *end = code + columns;
            for (; (code = static_cast<const int8_t*>(memchr(code, merge_code::kRaw, end - code))); code++) {
                const int64_t j = code - block.code[n];
                add_raw(task, (first + n) * pass.K + column + j, bits_of(block.weight[n][j]));
            }
        }
    }
    for (int n = 0; n < kRows; n++) {
        if (pass.to.factors.adapters) {
            copy(task.code_to + (i + n) * pass.code_stride + column, block.code[n], columns);
            copy(weight + n * pass.stride, block.merged[n], bytes);
        } else {
            copy(weight + n * pass.stride, block.weight[n], bytes);
        }
    }
    task.blocks++;
    return true;
}

template <class T>
static void merge_task_rows(const MergePass& pass, MergeTask& task, Rows& rows) {
    const int64_t ranks = pass.from.factors.R + pass.to.factors.R;
    const int64_t fitting_columns = kPanelFloats / ranks / kMergeGroup * kMergeGroup;
    const int64_t panel = smaller(larger(fitting_columns, kMergeGroup), kPanelColumns);
    for (int64_t column = 0; column < pass.K; column += panel) {
        const int64_t columns = smaller(panel, pass.K - column);
        for (int64_t i = 0; i < task.rows;) {
            if (task.blocks == task.max_blocks || __atomic_load_n(pass.stop, __ATOMIC_RELAXED)) return;
            const bool tall = i + kTileRows <= task.rows;
            if (!(tall ? merge_block<T, kTileRows>(pass, task, rows, i, column, columns)
                       : merge_block<T, 1>(pass, task, rows, i, column, columns))) {
                __atomic_store_n(pass.stop, 1, __ATOMIC_RELAXED);
                return;
            }
            i += tall ? kTileRows : 1;
        }
    }
    task.complete = true;
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

}  // namespace

void merge_pack(const MergeFactors& factors, int64_t K, int64_t group, float* packed) {
    const int64_t column = group * kMergeGroup, columns = smaller(kMergeGroup, K - column);
    for (int64_t r = 0; r < factors.R; r++) {
        float* to = packed + (group * factors.R + r) * kMergeGroup;
        widen(factors.lora_A, factors.dtype, r * K + column, to, columns);
        for (int64_t j = columns; j < kMergeGroup; j++) to[j] = 0;
    }
}

void merge_rows(const MergePass& pass, MergeTask& task) {
    const MergeFactors &from = pass.from.factors, &to = pass.to.factors;
    float* b = static_cast<float*>(scratch(kRowsSlot, task.rows * (from.R + to.R) * sizeof(float)));
    widen(from.lora_B, from.dtype, task.first_row * from.R, b, task.rows * from.R);
    widen(to.lora_B, to.dtype, task.first_row * to.R, b + task.rows * from.R, task.rows * to.R);
    Rows rows{b, b + task.rows * from.R, {}};
    task.blocks = 0, task.complete = false;
    for (int64_t i = 0; i < task.rows; i++) {
        rows.next[i] = first_raw(task.raws_from, task.raws_from_end, (task.first_row + i) * pass.K);
    }
    switch (pass.dtype) {
        case kFloat32: merge_task_rows<float>(pass, task, rows); break;
        case kBFloat16: merge_task_rows<bf16>(pass, task, rows); break;
        case kFloat16: merge_task_rows<f16>(pass, task, rows); break;
    }
}

}  // namespace PEFTK_LEVEL
}  // namespace peftk
