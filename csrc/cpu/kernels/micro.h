// The two register-tiled kernels on which all products are built.
//
// outer: lanes are `vectors` registers of one operand; the other is broadcast: c[i][lane] += Σ_s b[i][s] l[s][lane].
// dot:   lanes run along the contraction: out[i][j] = Σ_k x[i][k] w[j][k].
//
// Sums have two levels. A part of the contraction is one chain of fma from zero in ascending order, and is then added
// to the total. A single chain over thousands of terms would drift, since similar terms have similar rounding errors.
// Parts begin at fixed positions, whichever tile an output is in, so results do not depend on how the work is divided.
#pragma once

#include <type_traits>

#include "cpu/kernels/vec.h"

namespace peftk {
namespace PEFTK_LEVEL {

// Two bf16 that are consecutive in the contraction, in one 32-bit lane, as the dot-product instruction reads them.
struct __attribute__((packed, may_alias)) Pair {
    uint32_t bits;
};

PEFTK_INLINE Vec broadcast(const float* p) { return set1(*p); }
PEFTK_INLINE Vec accumulate(Vec b, Vec l, Vec acc) { return fma(b, l, acc); }
PEFTK_INLINE Vec load_lanes(const float* p) { return load(p); }
#ifdef PEFTK_DP
PEFTK_INLINE __m512i broadcast(const Pair* p) { return set1_pair(p->bits); }
PEFTK_INLINE Vec accumulate(__m512i b, __m512i l, Vec acc) { return dp(acc, b, l); }
PEFTK_INLINE __m512i load_lanes(const Pair* p) { return load_pairs(p); }
#endif

// Tiles are not inlined: inlined into some of their callers, their loops ran up to 3 % slower.
#define PEFTK_TILE static __attribute__((noinline))

// Rows of a tile that is `vectors` registers wide: accumulators, lanes and one broadcast fit into the registers.
constexpr int tile_rows(int vectors) { return vectors == 3 ? kRowsOfThree : kRowsOfTwo; }

// Divides a width in registers into panels: full ones first, then narrower ones; two narrower ones rather than one
// of width 1.
struct Panels {
    int64_t vectors;

    explicit Panels(int64_t lanes) : vectors((lanes + W - 1) / W) {}
    int64_t narrower() const {
        const int64_t missing = (kMaxVectors - vectors % kMaxVectors) % kMaxVectors;
        return missing < vectors ? missing : 0;  // panels that are one register narrower than the others
    }
    int64_t count() const { return (vectors + kMaxVectors - 1) / kMaxVectors; }
    int width(int64_t panel) const {  // registers
        const int64_t full = count() - narrower();
        return panel < full ? int(vectors < kMaxVectors ? vectors : kMaxVectors) : kMaxVectors - 1;
    }
    int64_t first(int64_t panel) const {  // lane
        const int64_t full = count() - narrower();
        return W * (panel * kMaxVectors - (panel > full ? panel - full : 0));
    }
    int64_t of_lane(int64_t lane) const {  // lane: a multiple of W
        const int64_t full = (count() - narrower()) * kMaxVectors, v = lane / W;
        return v < full || narrower() == 0 ? v / kMaxVectors : full / kMaxVectors + (v - full) / (kMaxVectors - 1);
    }
};

template <class T>
struct Operand {
    const T* data;
    int64_t row, step;
};

// What to prefetch for the next tiles, one cache line of each at every step: along `lanes` into L1, and kPrefetchLines
// lines of each of the `rows` into L2. Invalid addresses do no harm.
struct Prefetch {
    const char* lanes;
    int64_t lanes_step;  // bytes
    const char* rows;
    int64_t rows_step;
};
constexpr int kPrefetchLines = 16;

// Steps of a part. A chain of n similar terms has an error of up to n / 4 units in the last place; docs/numerics.md
// allows 2 √n. Results of pairs are rounded to bf16, which outweighs that error, so their part is as long as the
// caller's loop.
template <class T>
struct OuterPart {
    static constexpr int64_t kSteps = 32;
};
template <>
struct OuterPart<Pair> {
    static constexpr int64_t kSteps = 256;
};

template <class T, int kRows, int kVectors>
PEFTK_TILE void outer_tile(Operand<T> b, const T* l, int64_t l_step, int64_t steps, float* c, int64_t c_row, bool fresh,
                           Prefetch ahead) {
    Vec acc[kRows][kVectors];
    const T* rows = b.data;
    int64_t s = 0;
    do {
        // every loop over the tile must be unrolled, since a variable index would put the tile into memory
#pragma GCC unroll 16
        for (int i = 0; i < kRows; i++) {
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; v++) acc[i][v] = zero();
        }
        const int64_t end = s + OuterPart<T>::kSteps < steps ? s + OuterPart<T>::kSteps : steps;
        for (; s < end; ahead.rows += ahead.rows_step) {
            const char* line = ahead.rows;
            for (const int64_t stop = s + kPrefetchLines < end ? s + kPrefetchLines : end; s < stop; s++) {
                decltype(load_lanes(l)) lanes[kVectors];
#pragma GCC unroll 4
                for (int v = 0; v < kVectors; v++) lanes[v] = load_lanes(l + v * W);
#pragma GCC unroll 16
                for (int i = 0; i < kRows; i++) {
                    const auto value = broadcast(rows + i * b.row);
#pragma GCC unroll 4
                    for (int v = 0; v < kVectors; v++) acc[i][v] = accumulate(value, lanes[v], acc[i][v]);
                }
                __builtin_prefetch(line, 0, 2);
                __builtin_prefetch(ahead.lanes, 0, 3);
                line += 64;
                ahead.lanes += ahead.lanes_step;
                rows += b.step;
                l += l_step;
            }
        }
        if (fresh) {
#pragma GCC unroll 16
            for (int i = 0; i < kRows; i++) {
#pragma GCC unroll 4
                for (int v = 0; v < kVectors; v++) store(c + i * c_row + v * W, acc[i][v]);
            }
        } else {
#pragma GCC unroll 16
            for (int i = 0; i < kRows; i++) {
#pragma GCC unroll 4
                for (int v = 0; v < kVectors; v++) {
                    float* total = c + i * c_row + v * W;
                    store(total, add(load(total), acc[i][v]));
                }
            }
        }
        fresh = false;
    } while (s < steps);
}

template <class T, int kRows, int kVectors>
static void outer_rows(int rows, Operand<T> b, const T* l, int64_t l_step, int64_t steps, float* c, int64_t c_row,
                       bool fresh, Prefetch ahead) {
    if (rows == kRows) {
        outer_tile<T, kRows, kVectors>(b, l, l_step, steps, c, c_row, fresh, ahead);
    } else if constexpr (kRows > 1) {
        outer_rows<T, kRows - 1, kVectors>(rows, b, l, l_step, steps, c, c_row, fresh, ahead);
    }
}

template <class T, int kVectors>
static void outer_vectors(int rows, int vectors, Operand<T> b, const T* l, int64_t l_step, int64_t steps, float* c,
                          int64_t c_row, bool fresh, Prefetch ahead) {
    if (vectors == kVectors) {
        outer_rows<T, tile_rows(kVectors), kVectors>(rows, b, l, l_step, steps, c, c_row, fresh, ahead);
    } else if constexpr (kVectors > 1) {
        outer_vectors<T, kVectors - 1>(rows, vectors, b, l, l_step, steps, c, c_row, fresh, ahead);
    }
}

// `rows` rows of b times one panel of `vectors` <= kMaxVectors registers, added to c [rows, c_row], or stored there if
// `fresh`. ahead(i) is what to prefetch during the tile that starts at row i.
template <class T, class PrefetchOf>
static void outer(int64_t rows, int vectors, Operand<T> b, const T* l, int64_t l_step, int64_t steps, float* c,
                  int64_t c_row, bool fresh, PrefetchOf ahead) {
    if (rows == 0) return;
    // tiles of about the same height, since a low tile has too few sums to hide the latency of fma
    const int64_t tiles = (rows + tile_rows(vectors) - 1) / tile_rows(vectors), height = (rows + tiles - 1) / tiles;
    for (int64_t i = 0; i < rows; i += height) {
        const int count = int(rows - i < height ? rows - i : height);
        outer_vectors<T, kMaxVectors>(count, vectors, {b.data + i * b.row, b.row, b.step}, l, l_step, steps,
                                      c + i * c_row, c_row, fresh, ahead(i));
    }
}

template <class T>
static void outer(int64_t rows, int vectors, Operand<T> b, const T* l, int64_t l_step, int64_t steps, float* c,
                  int64_t c_row, bool fresh) {
    const char* harmless = reinterpret_cast<const char*>(c);
    outer<T>(rows, vectors, b, l, l_step, steps, c, c_row, fresh,
             [&](int64_t) { return Prefetch{harmless, 0, harmless, 0}; });
}

// A row in fp32 in which every block of 2W elements is stored as W even and then W odd elements, padded with zeros: the
// order in which bf16 can be widened without a shuffle.
struct __attribute__((packed, may_alias)) EvenOdd {
    float value;
};

// A step of the dot product: kElements elements of both rows, in kRegisters registers each. U: an element of the second
// operand; or, if it is packed, one of its rows, in which case kDecodes is true, and a step of such a row is decoded
// once for all tokens (cpu/kernels/packed.h).
template <class U>
struct PlainStep {
    static constexpr bool kDecodes = false;
    static constexpr int kLine = 64 / sizeof(U);  // elements of a cache line
    PEFTK_INLINE void fetch(const U* row, int64_t k) { __builtin_prefetch(row + k, 0, 2); }
};

template <class T, class U>
struct DotStep : PlainStep<U> {
    static constexpr int kElements = W, kRegisters = 1, kUnit = W;
    PEFTK_INLINE Vec first(const T* p, int) { return load(p); }
    PEFTK_INLINE Vec first_n(const T* p, int, int n) { return load_n(p, n); }
    PEFTK_INLINE Vec second(const U* p, int) { return load(p); }
    PEFTK_INLINE Vec second_n(const U* p, int, int n) { return load_n(p, n); }
};

template <>
struct DotStep<EvenOdd, bf16> : PlainStep<bf16> {
    static constexpr int kElements = 2 * W, kRegisters = 2, kUnit = 2 * W;
    PEFTK_INLINE Vec first(const EvenOdd* p, int odd) { return load(reinterpret_cast<const float*>(p) + odd * W); }
    PEFTK_INLINE Vec first_n(const EvenOdd* p, int odd, int) { return first(p, odd); }
    PEFTK_INLINE Vec second(const bf16* p, int odd) { return odd ? load_odd(p) : load_even(p); }
    PEFTK_INLINE Vec second_n(const bf16* p, int odd, int n) {
        bf16 full[2 * W] = {};
        memcpy(full, p, n * sizeof(bf16));
        return second(full, odd);
    }
};

#ifdef PEFTK_DP
template <>
struct DotStep<bf16, bf16> : PlainStep<bf16> {
    static constexpr int kElements = 2 * W, kRegisters = 1, kUnit = 2 * W;
    PEFTK_INLINE __m512i first(const bf16* p, int) { return load_pairs(p); }
    PEFTK_INLINE __m512i first_n(const bf16* p, int, int n) { return load_pairs_n(p, n); }
    PEFTK_INLINE __m512i second(const bf16* p, int) { return load_pairs(p); }
    PEFTK_INLINE __m512i second_n(const bf16* p, int, int n) { return load_pairs_n(p, n); }
};
#endif

// A part of the contraction. Its sums are added to the totals of the lanes; at the end the totals are reduced to `out`.
struct Part {
    int64_t first, last;  // elements
    bool starts, ends;
};
constexpr int64_t kDotPart = 64;  // times kUnit elements: the rows of w stay in L1 while all tiles of tokens use them
constexpr int64_t kLongPart = 32 * W;  // for a single tile: as many as the error of W parallel chains allows

// The second operand's rows: a pointer to the first, w_row elements from one to the next; or a packed row, w_row rows.
template <class Rows>
using RowOf = std::remove_const_t<std::remove_pointer_t<Rows>>;

template <class T, class Rows, int kTokens, int kRows>
PEFTK_TILE void dot_tile(const T* const* x, Rows w, int64_t w_row, const Part& part, Vec* total, float* out,
                         int64_t out_row, Rows ahead, int64_t ahead_row) {
    typedef DotStep<T, RowOf<Rows>> Step;
    Vec acc[kTokens][kRows];
#pragma GCC unroll 8
    for (int i = 0; i < kTokens; i++) {
#pragma GCC unroll 8
        for (int j = 0; j < kRows; j++) acc[i][j] = zero();
    }
    [[maybe_unused]] const auto add_products = [&](auto load_first, auto load_second) __attribute__((always_inline)) {
#pragma GCC unroll 2
        for (int r = 0; r < Step::kRegisters; r++) {
            // Rows are loaded again for the second register: kept in registers, they would leave no room for the tile.
            Rows rows = w;
            if constexpr (Step::kRegisters > 1) asm volatile("" : "+r"(rows));
            // the side with fewer operands stays in registers
            if constexpr (kTokens <= kRows) {
                decltype(load_first(x[0], r)) first[kTokens];
#pragma GCC unroll 8
                for (int i = 0; i < kTokens; i++) first[i] = load_first(x[i], r);
#pragma GCC unroll 8
                for (int j = 0; j < kRows; j++) {
                    const auto second = load_second(rows + j * w_row, r);
#pragma GCC unroll 8
                    for (int i = 0; i < kTokens; i++) acc[i][j] = accumulate(first[i], second, acc[i][j]);
                }
            } else {
                decltype(load_second(rows, r)) second[kRows];
#pragma GCC unroll 8
                for (int j = 0; j < kRows; j++) second[j] = load_second(rows + j * w_row, r);
#pragma GCC unroll 8
                for (int i = 0; i < kTokens; i++) {
                    const auto first = load_first(x[i], r);
#pragma GCC unroll 8
                    for (int j = 0; j < kRows; j++) acc[i][j] = accumulate(first, second[j], acc[i][j]);
                }
            }
        }
    };
    [[maybe_unused]] const auto add_decoded = [&](auto load_first, auto decode) __attribute__((always_inline)) {
#pragma GCC unroll 8
        for (int j = 0; j < kRows; j++) {
            Vec second[Step::kRegisters];
            decode(w + j * w_row, second);
#pragma GCC unroll 8
            for (int i = 0; i < kTokens; i++) {
#pragma GCC unroll 8
                for (int r = 0; r < Step::kRegisters; r++) acc[i][j] = fma(load_first(x[i], r), second[r], acc[i][j]);
            }
        }
    };
    int64_t k = part.first;
    const auto add_step = [&]() __attribute__((always_inline)) {
        const auto first = [&](const T* p, int r) { return Step::first(p + k, r); };
        if constexpr (Step::kDecodes) {
            add_decoded(first, [&](const Rows& row, Vec* to) { Step::decode(row, k, to); });
        } else {
            add_products(first, [&](Rows p, int r) { return Step::second(p + k, r); });
        }
        k += Step::kElements;
    };
    while (k + Step::kLine <= part.last) {
#pragma GCC unroll 8
        for (int j = 0; j < kRows; j++) Step::fetch(ahead + j * ahead_row, k);
#pragma GCC unroll 8
        for (int i = 0; i < Step::kLine / Step::kElements; i++) add_step();
    }
    while (k + Step::kElements <= part.last) add_step();
    if (const int rest = int(part.last - k)) {
        const auto first = [&](const T* p, int r) { return Step::first_n(p + k, r, rest); };
        if constexpr (Step::kDecodes) {
            add_decoded(first, [&](const Rows& row, Vec* to) { Step::decode_n(row, k, rest, to); });
        } else {
            add_products(first, [&](Rows p, int r) { return Step::second_n(p + k, r, rest); });
        }
    }
    if (!part.starts) {
#pragma GCC unroll 8
        for (int i = 0; i < kTokens; i++) {
#pragma GCC unroll 8
            for (int j = 0; j < kRows; j++) acc[i][j] = add(total[i * kRows + j], acc[i][j]);
        }
    }
    if (!part.ends) {
#pragma GCC unroll 8
        for (int i = 0; i < kTokens; i++) {
#pragma GCC unroll 8
            for (int j = 0; j < kRows; j++) total[i * kRows + j] = acc[i][j];
        }
        return;
    }
#pragma GCC unroll 8
    for (int i = 0; i < kTokens; i++) {
#pragma GCC unroll 8
        for (int j = 0; j < kRows; j++) out[i * out_row + j] = reduce(acc[i][j]);
    }
}

// `ahead`: the rows that are needed next. Each tile prefetches its share of them.
template <class T, class Rows, int kTokens, int kRows>
static void dot_tokens(int64_t tokens, const T* const* x, Rows w, int64_t w_row, const Part& part, Vec* total,
                       float* out, int64_t out_row, Rows ahead, int64_t ahead_row) {
    for (; tokens >= kTokens; tokens -= kTokens) {
        dot_tile<T, Rows, kTokens, kRows>(x, w, w_row, part, total, out, out_row, ahead, ahead_row);
        x += kTokens;
        total += kTokens * kRows;
        out += kTokens * out_row;
        ahead = ahead + w_row;
    }
    if constexpr (kTokens > 1) {
        dot_tokens<T, Rows, kTokens - 1, kRows>(tokens, x, w, w_row, part, total, out, out_row, ahead, ahead_row);
    }
}

// kTokens: tokens of the tallest tile. Not inlined either: bf16 layers of 576 × 576 with 4 and 8 tokens ran 10 and 13 %
// faster then on a Zen 3, and none slower by more than 1 %.
template <class T, class Rows, int kTokens, int kRows>
PEFTK_TILE void dot_rows(int64_t tokens, const T* const* x, Rows w, int64_t w_row, int64_t K, float* out,
                         int64_t out_row, Rows ahead) {
    Vec total[kMaxDotTokens * kRows];
    const int64_t length = (tokens <= kTokens ? kLongPart : kDotPart) * DotStep<T, RowOf<Rows>>::kUnit;
    const int64_t tiles = (tokens + kTokens - 1) / kTokens;
    int64_t first = 0;
    do {
        const bool ends = first + length >= K;
        const Part part{first, ends ? K : first + length, first == 0, ends};
        dot_tokens<T, Rows, kTokens, kRows>(tokens, x, w, w_row, part, total, out, out_row, ahead, tiles * w_row);
        first += length;
    } while (first < K);
}

// What a stream fetches while it is at this row: a plain one nothing, its loads run ahead far enough.
template <class U>
PEFTK_INLINE const U* ahead_in_stream(const U* row) {
    return row;
}

// With one token, the speed is that of reading W. kStreams distant rows of w are read in parallel: each is a separate
// stream of consecutive pages for the processor's prefetchers, which reach a higher bandwidth that way.
template <class T, class Rows>
static void dot_streams(const T* const* x, int64_t rows, Rows w, int64_t w_row, int64_t K, float* out) {
    const int64_t spacing = rows / kStreams;
    for (int64_t i = 0; i < spacing; i++) {
        float sums[kStreams];
        const Rows first = w + i * w_row;
        dot_rows<T, Rows, 1, kStreams>(1, x, first, spacing * w_row, K, sums, kStreams, ahead_in_stream(first));
        for (int s = 0; s < kStreams; s++) out[i + s * spacing] = sums[s];
    }
}

// out [tokens, out_row] = rows x[i] times `rows` rows of w, for at most kMaxDotTokens tokens. `after`: the rows that
// the next call reads.
template <class T, class Rows>
static void dot(int64_t tokens, const T* const* x, int64_t rows, Rows w, int64_t w_row, int64_t K, float* out,
                int64_t out_row, Rows after) {
    constexpr int64_t kRest = kDotRows < 4 ? kDotRows : 4;  // a page of 16 ranks is 6 + 6 + 4
    if constexpr (kStreams > 1) {
        if (tokens == 1) {
            const int64_t streamed = rows / kStreams * kStreams;
            dot_streams(x, streamed, w, w_row, K, out);
            rows -= streamed, w = w + streamed * w_row, out += streamed;
        }
    }
    for (; rows >= kDotRows; rows -= kDotRows, w = w + kDotRows * w_row, out += kDotRows) {
        const Rows ahead = rows > kDotRows ? w + kDotRows * w_row : after;
        dot_rows<T, Rows, kDotTokens, kDotRows>(tokens, x, w, w_row, K, out, out_row, ahead);
    }
    for (; rows >= kRest; rows -= kRest, w = w + kRest * w_row, out += kRest) {
        const Rows ahead = rows > kRest ? w + kRest * w_row : after;
        dot_rows<T, Rows, kDotTokens, kRest>(tokens, x, w, w_row, K, out, out_row, ahead);
    }
    for (; rows > 0; rows--, w = w + w_row, out++) {
        dot_rows<T, Rows, kDotTokens, 1>(tokens, x, w, w_row, K, out, out_row, rows > 1 ? w + w_row : after);
    }
}

}  // namespace PEFTK_LEVEL
}  // namespace peftk
