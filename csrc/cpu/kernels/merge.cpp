// W' = round(fl(W + d)) and back, with d in one fixed chain of roundings (docs/merge.md): one pass over W, in place.
//
// A task's rows are processed in blocks, as high as one register tile, and a block tile by tile: the chains of fma, W'
// and W″, and their codes (merge_lanes.h). Every multiply-add below is an explicit fma; with -ffp-contract=off no other
// operations are contracted.

#include "cpu/merge.h"

#include "cpu/checksum.h"
#include "cpu/kernels/checksum.h"
#include "cpu/kernels/merge_lanes.h"
#include "cpu/scratch.h"

namespace peftk {
namespace PEFTK_LEVEL {
namespace {

// A panel: its part of A stays in the L2 cache while all rows of a task use it.
constexpr int64_t kPanelFloats = 1 << 16, kBlockColumns = 512;
constexpr int64_t kAhead = 512;  // bytes of a row of W
static_assert(kMergeTaskRows % kTileRows == 0 && kMergeGroup % kColumns == 0 && kBlockColumns % kMergeGroup == 0);

PEFTK_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
PEFTK_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// fl(b * a + t). An architecture's baseline may have it only in software.
PEFTK_INLINE Vec exact_fma(Vec b, Vec a, Vec t) {
#if PEFTK_LEVEL_NUMBER == 0
    for (int i = 0; i < W; i++) t[i] = __builtin_fmaf(b[i], a[i], t[i]);
    return t;
#else
    return fma(b, a, t);
#endif
}

// kRows rows and kColumns columns of one adapter's chains, from rank r up to `end`. `a` is packed A from the tile's
// first column, `b` the tile's rows of B as [R][kRows] in fp32.
template <int kRows>
PEFTK_INLINE void chains(const float* a, const float* b, int64_t r, int64_t end, Vec (*chain)[kVectors]) {
    for (int i = 0; i < kRows; i++) {
        for (int v = 0; v < kVectors; v++) chain[i][v] = zero();
    }
    for (; r < end; r++) {
        Vec panel[kVectors];
        for (int v = 0; v < kVectors; v++) panel[v] = load(a + r * kMergeGroup + v * W);
        for (int i = 0; i < kRows; i++) {
            const Vec factor = set1(b[r * kRows + i]);
            for (int v = 0; v < kVectors; v++) chain[i][v] = exact_fma(factor, panel[v], chain[i][v]);
        }
    }
}

// d of a tile: the scaled chains of all adapters, added in order.
template <int kRows>
PEFTK_INLINE void deltas(const MergeFactors& factors, const float* a, const float* b, Vec (*d)[kVectors]) {
    Vec chain[kRows][kVectors];
    chains<kRows>(a, b, 0, factors.ends[0], chain);
    const Vec scaling = set1(factors.scaling[0]);
    for (int i = 0; i < kRows; i++) {
        for (int v = 0; v < kVectors; v++) d[i][v] = mul(scaling, chain[i][v]);
    }
    for (int64_t t = 1; t < factors.adapters; t++) {
        chains<kRows>(a, b, factors.ends[t - 1], factors.ends[t], chain);
        const Vec scaling = set1(factors.scaling[t]);
        for (int i = 0; i < kRows; i++) {
            for (int v = 0; v < kVectors; v++) d[i][v] = add(d[i][v], mul(scaling, chain[i][v]));
        }
    }
}

PEFTK_INLINE uint32_t bits_of(float value) { return float_to_bits(value); }
PEFTK_INLINE uint32_t bits_of(bf16 value) { return value.bits; }
PEFTK_INLINE uint32_t bits_of(f16 value) { return value.bits; }
PEFTK_INLINE void set_bits(float* to, uint32_t bits) { *to = bits_to_float(bits); }
PEFTK_INLINE void set_bits(bf16* to, uint32_t bits) { to->bits = uint16_t(bits); }
PEFTK_INLINE void set_bits(f16* to, uint32_t bits) { to->bits = uint16_t(bits); }

// A tile of W, in W or in a padded copy, with its codes, A and B.
template <class T>
struct Tile {
    T* weight;
    int64_t stride;
    int8_t* code;
    int64_t code_stride;
    const float *a, *b;
};

// Adds a row's raw weights, or all of its weights if their W' are not all finite.
template <class T>
static __attribute__((noinline)) void add_raws(MergeTask& task, const T* weight, const int8_t* code, int64_t index,
                                               int64_t columns, bool all) {
    for (int64_t j = 0; j < columns; j++) {
        if (all || code[j] == merge_code::kRaw) task.raws_to[task.raw_count++] = {index + j, bits_of(weight[j])};
    }
}

// W to W' and the codes. `index` and `columns`: of the tile's first element in the flattened W, and how many of its
// columns W has. Returns whether all W' are finite. Those that are not are raw, so that the codes undo them too.
template <class T, int kRows>
PEFTK_INLINE bool merge_tile(const MergePass& pass, MergeTask& task, const Tile<T> tile, int64_t index,
                             int64_t columns) {
    typedef Stored<T> S;
    constexpr int kRegisters = kVectors / S::kParts, kPair = kRows < 2 ? 1 : 2;
    Vec d[kRows][kVectors];
    deltas<kRows>(pass.to.factors, tile.a, tile.b, d);
    // In two steps through the L1 cache, which the asm keeps apart: in one, a weight's chain of operations is too long
    // for the processor to overlap.
    typename S::Bits merged[kRows][kRegisters], back[kRows][kRegisters];
    SignedLanes largest{};
    for (int i = 0; i < kRows; i++) {
        for (int g = 0; g < kRegisters; g++) {
            Vec values[S::kParts];
            S::widen(read<typename S::Bits>(tile.weight + i * tile.stride + g * S::kParts * W), values);
            for (int v = 0; v < S::kParts; v++) {
                values[v] = add(values[v], d[i][g * S::kParts + v]);
                const SignedLanes magnitude = (SignedLanes)values[v] & 0x7fffffff;
                largest = magnitude > largest ? magnitude : largest;
            }
            merged[i][g] = S::round(values);
            S::widen(merged[i][g], values);
            for (int v = 0; v < S::kParts; v++) values[v] = values[v] - d[i][g * S::kParts + v];
            back[i][g] = S::round(values);
        }
    }
    asm volatile("" ::: "memory");
    Lanes raw{};
    for (int i = 0; i < kRows; i += kPair) {
        typename S::Bits weight[kPair][kRegisters];
        for (int n = 0; n < kPair; n++) {
            for (int g = 0; g < kRegisters; g++) {
                weight[n][g] = read<typename S::Bits>(tile.weight + (i + n) * tile.stride + g * S::kParts * W);
            }
        }
        raw |= encode<T, kPair>(weight, back + i, tile.code + i * tile.code_stride, tile.code_stride);
    }
    const Lanes infinite = (Lanes)(largest >= S::kLimit);
    bool finite = true;
    if (__builtin_expect(any(raw | infinite), 0) && !pass.undoing) {
        finite = !any(infinite);
        for (int i = 0; i < kRows; i++) {
            add_raws(task, tile.weight + i * tile.stride, tile.code + i * tile.code_stride, index + i * pass.K, columns,
                     !finite);
        }
    }
    for (int i = 0; i < kRows; i++) {
        for (int g = 0; g < kRegisters; g++) write(tile.weight + i * tile.stride + g * S::kParts * W, merged[i][g]);
    }
    return finite;
}

// W' and the codes to W. Raw weights become W″.
template <class T, int kRows>
PEFTK_INLINE void unmerge_tile(const MergePass& pass, const Tile<T> tile) {
    typedef Stored<T> S;
    Vec d[kRows][kVectors];
    deltas<kRows>(pass.from.factors, tile.a, tile.b, d);
    typename S::Bits back[kRows][kVectors / S::kParts];
    for (int i = 0; i < kRows; i++) {
        for (int g = 0; g < kVectors / S::kParts; g++) {
            Vec values[S::kParts];
            S::widen(read<typename S::Bits>(tile.weight + i * tile.stride + g * S::kParts * W), values);
            for (int v = 0; v < S::kParts; v++) values[v] = values[v] - d[i][g * S::kParts + v];
            back[i][g] = S::round(values);
        }
    }
    asm volatile("" ::: "memory");
    for (int i = 0; i < kRows; i++) {
        for (int g = 0; g < kVectors / S::kParts; g++) {
            const auto code = S::widen_codes(tile.code + i * tile.code_stride + g * S::kParts * W);
            write(tile.weight + i * tile.stride + g * S::kParts * W,
                  merge_code::decode<typename S::Lane, S::kMagnitude>(back[i][g], code));
        }
    }
}

// Shared by a task's blocks: the widened rows of B, tile by tile as [R][rows of the tile], the sum of each row's bits
// so far, and each row's next raw weight of `from`.
struct Rows {
    const float *b_from, *b_to;
    uint32_t sums[kMergeTaskRows];
    const RawWeight* next[kMergeTaskRows];
};

// Calls run(tile, column in the block, columns of W) for a block's tiles. The last one of a row is padded if it is
// narrower. The rows are too many for the processor's own prefetching.
template <class T, int kRows, class Run>
PEFTK_INLINE void for_each_tile(const MergePass& pass, const MergeSide& side, const float* b, int8_t* code, T* weight,
                                int64_t stride, int64_t column, int64_t columns, const Run& run) {
    for (int64_t c = 0; c < columns; c += kColumns) {
        const int64_t at = column + c, here = smaller(kColumns, columns - c);
        const float* a = side.packed + (at / kMergeGroup * side.factors.R) * kMergeGroup + at % kMergeGroup;
        for (int i = 0; i < kRows; i++) {
            for (size_t byte = 0; byte < kColumns * sizeof(T); byte += 64) {
                __builtin_prefetch(reinterpret_cast<const char*>(weight + i * stride + c) + kAhead + byte);
            }
        }
        if (here == kColumns) {
            run(Tile<T>{weight + c, stride, code + c, pass.code_stride, a, b}, c, here);
            continue;
        }
        T padded[kRows][kColumns] = {};
        for (int i = 0; i < kRows; i++) memcpy(padded[i], weight + i * stride + c, here * sizeof(T));
        run(Tile<T>{padded[0], kColumns, code + c, pass.code_stride, a, b}, c, here);
        for (int i = 0; i < kRows; i++) memcpy(weight + i * stride + c, padded[i], here * sizeof(T));
    }
}

// Processes one block: rows i … i + kRows - 1 of the task. Returns whether all of it is finite. From one merge to
// another it goes through a copy, so that W never holds the base layer meanwhile.
template <class T, int kRows>
static bool merge_block(const MergePass& pass, MergeTask& task, Rows& rows, int64_t i, int64_t column,
                        int64_t columns) {
    const int64_t first = task.first_row + i;
    T* const in_place = static_cast<T*>(pass.weight) + first * pass.stride + column;
    const bool copies = pass.from.factors.adapters && pass.to.factors.adapters;
    alignas(64) T copy[kRows][kBlockColumns];
    T* const weight = copies ? copy[0] : in_place;
    const int64_t stride = copies ? kBlockColumns : pass.stride;
    for (int n = 0; n < kRows && copies; n++) memcpy(copy[n], in_place + n * pass.stride, columns * sizeof(T));
    if (pass.from.factors.adapters) {
        int8_t* const code = task.code_from + i * pass.code_stride + column;
        for_each_tile<T, kRows>(pass, pass.from, rows.b_from + i * pass.from.factors.R, code, weight, stride, column,
                                columns,
                                [&](const Tile<T>& tile, int64_t, int64_t) { unmerge_tile<T, kRows>(pass, tile); });
        for (int n = 0; n < kRows; n++) {
            const int64_t start = (first + n) * pass.K + column;
            const RawWeight*& raw = rows.next[i + n];
            for (; raw < task.raws_from_end && raw->index < start + columns; raw++) {
                set_bits(weight + n * stride + (raw->index - start), raw->bits);
            }
        }
    }
    bool finite = true;
    if (pass.to.factors.adapters) {
        int8_t* const code = task.code_to + i * pass.code_stride + column;
        for_each_tile<T, kRows>(pass, pass.to, rows.b_to + i * pass.to.factors.R, code, weight, stride, column, columns,
                                [&](const Tile<T>& tile, int64_t c, int64_t here) {
                                    finite &= merge_tile<T, kRows>(pass, task, tile, first * pass.K + column + c, here);
                                });
        for (int n = 0; n < kRows; n++) {
            rows.sums[i + n] += sum_of_bits(weight + n * stride, pass.dtype, column, columns);
        }
    }
    for (int n = 0; n < kRows && copies; n++) memcpy(in_place + n * pass.stride, copy[n], columns * sizeof(T));
    task.blocks++;
    return finite;
}

template <class T>
static void merge_task_rows(const MergePass& pass, MergeTask& task, Rows& rows) {
    const int64_t ranks = pass.from.factors.R + pass.to.factors.R;
    const int64_t fitting_columns = kPanelFloats / ranks / kMergeGroup * kMergeGroup;
    const int64_t panel = larger(fitting_columns, kMergeGroup);
    for (int64_t first = 0; first < pass.K; first += panel) {
        const int64_t end = smaller(first + panel, pass.K);
        for (int64_t i = 0; i < task.rows;) {
            const bool tall = i + kTileRows <= task.rows;
            for (int64_t column = first; column < end; column += kBlockColumns) {
                if (task.blocks == task.max_blocks || __atomic_load_n(pass.stop, __ATOMIC_RELAXED)) return;
                const int64_t columns = smaller(kBlockColumns, end - column);
                if (!(tall ? merge_block<T, kTileRows>(pass, task, rows, i, column, columns)
                           : merge_block<T, 1>(pass, task, rows, i, column, columns))) {
                    __atomic_store_n(pass.stop, 1, __ATOMIC_RELAXED);
                    return;
                }
            }
            i += tall ? kTileRows : 1;
        }
    }
    task.complete = true;
}

template <class Adapter>
void widen(const void* from, float* to, int64_t count) {
    const Adapter* values = static_cast<const Adapter*>(from);
    for (int64_t i = 0; i < count; i++) to[i] = to_float(values[i]);
}

// `offset` in elements of the adapter's dtype.
void widen(const void* adapter, Dtype dtype, int64_t offset, float* to, int64_t count) {
    const void* from = static_cast<const char*>(adapter) + offset * size_of(dtype);
    switch (dtype) {
        case kFloat32: widen<float>(from, to, count); break;
        case kBFloat16: widen<bf16>(from, to, count); break;
        case kFloat16: widen<f16>(from, to, count); break;
    }
}

// B's rows of a task, widened, tile by tile: each as [R][rows of the tile]. `rows` has room for as many values.
void widen_rows(const MergeFactors& factors, const MergeTask& task, float* rows, float* to) {
    widen(factors.lora_B, factors.dtype, task.first_row * factors.R, rows, task.rows * factors.R);
    for (int64_t i = 0; i < task.rows;) {
        const int64_t tile_rows = i + kTileRows <= task.rows ? kTileRows : 1;
        for (int64_t r = 0; r < factors.R; r++) {
            for (int64_t n = 0; n < tile_rows; n++) *to++ = rows[(i + n) * factors.R + r];
        }
        i += tile_rows;
    }
}

}  // namespace

void merge_pack(const MergeFactors& factors, Dtype dtype, int64_t K, int64_t group, float* packed) {
    const int64_t column = group * kMergeGroup, columns = smaller(kMergeGroup, K - column);
    for (int64_t r = 0; r < factors.R; r++) {
        float row[kMergeGroup] = {}, *to = packed + (group * factors.R + r) * kMergeGroup;
        widen(factors.lora_A, factors.dtype, r * K + column, row, columns);
        if (dtype == kBFloat16) {
            Stored<bf16>::order(row, to, kMergeGroup);
        } else {
            memcpy(to, row, sizeof row);
        }
    }
}

void merge_rows(const MergePass& pass, MergeTask& task) {
    const MergeFactors &from = pass.from.factors, &to = pass.to.factors;
    const int64_t values = task.rows * (from.R + to.R);
    float* b = static_cast<float*>(scratch(kRowsSlot, 2 * values * sizeof(float)));
    widen_rows(from, task, b + values, b);
    widen_rows(to, task, b + values, b + task.rows * from.R);
    Rows rows{b, b + task.rows * from.R, {}, {}};
    task.blocks = 0, task.complete = false;
    if (!pass.undoing) task.raw_count = 0;
    for (int64_t i = 0; i < task.rows; i++) {
        rows.next[i] = first_raw(task.raws_from, task.raws_from_end, (task.first_row + i) * pass.K);
    }
    switch (pass.dtype) {
        case kFloat32: merge_task_rows<float>(pass, task, rows); break;
        case kBFloat16: merge_task_rows<bf16>(pass, task, rows); break;
        case kFloat16: merge_task_rows<f16>(pass, task, rows); break;
    }
    task.checksum = 0;
    for (int64_t i = 0; i < task.rows; i++) task.checksum += checksum_share(task.first_row + i, rows.sums[i]);
}

}  // namespace PEFTK_LEVEL
}  // namespace peftk
