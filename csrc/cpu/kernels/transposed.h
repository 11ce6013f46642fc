// The transposed form of the product: few rows in batch-invariant mode, where W is contiguous along the contraction.
//
// Its sums are those of the forms for many rows: a part of the contraction is one chain of fma, in ascending order, and
// so are the parts. Lanes are W parts of one row of the weight, side by side: blocks of it, [W parts, a few steps], are
// transposed in registers, so that each lane sees its own part in order. What is left over, less than W parts, has W
// rows of the weight in its lanes.
#pragma once

#include "cpu/kernels/linear.h"

namespace peftk {
namespace PEFTK_LEVEL {

#ifndef PEFTK_TRANSPOSES_STEPS
constexpr int kTransposedSteps = W, kTransposedTokens = 8;
template <class T>
PEFTK_INLINE void transpose_steps(const T* from, int64_t from_stride, Vec* to) {
    transpose(from, from_stride, to);
}
#endif
constexpr int kTransposedChains = 8;  // sums that a tile has at once, to hide the latency of fma

// The parts of a contraction in batch-invariant mode, in steps: `groups` times W parts of `length`, and what is left,
// in parts of up to `length`.
struct InvariantParts {
    int64_t groups, length;
    int64_t grouped() const { return groups * W * length; }
};

// steps: of the contraction, elements or pairs. Long parts, which cost many rows little, but W or more of them.
static inline InvariantParts invariant_parts(int64_t steps, bool pairs) {
#ifdef PEFTK_PANELS
    constexpr int64_t kShortest = 48, kLongest = 256;
#else
    if (!pairs) return {steps / (W * OuterPart<float>::kSteps), OuterPart<float>::kSteps};
    constexpr int64_t kShortest = W, kLongest = OuterPart<Pair>::kSteps;
#endif
    const int64_t groups = ceil_div(steps, W * kLongest), length = steps / max64(W * groups, 1) / W * W;
    if (length >= kShortest) return {groups, length};
    return {0, pairs ? kLongest : steps < 128 ? 32 : 64};
}

// W rows or parts of the weight, `stride` elements from one to the next, as a register of lanes for each of kSteps
// steps. X: the input's elements, float or Pair.
template <class T, class X>
struct TransposedBlock {
    static constexpr int kSteps = kTransposedSteps, kElements = kSteps;
    Vec lanes[kSteps];
    PEFTK_MEMBER TransposedBlock(const T* from, int64_t stride) { transpose_steps(from, stride, lanes); }
};
#ifdef PEFTK_TRANSPOSES_STEPS
// Pairs of bf16 are transposed together and then widened, which takes half the shuffles.
template <>
struct TransposedBlock<bf16, float> {
    static constexpr int kSteps = 2 * kTransposedSteps, kElements = kSteps;
    Vec lanes[kSteps];
    PEFTK_MEMBER TransposedBlock(const bf16* from, int64_t stride) {
        Vec pairs[kTransposedSteps];
        transpose_steps(from, stride, pairs);
#pragma GCC unroll 8
        for (int j = 0; j < kTransposedSteps; j++) {
            lanes[2 * j] = widen_even(pairs[j]);
            lanes[2 * j + 1] = widen_odd(pairs[j]);
        }
    }
};
#endif
#ifdef PEFTK_DP
template <>
struct TransposedBlock<bf16, Pair> {
    static constexpr int kSteps = W, kElements = 2 * W;
    __m512i lanes[kSteps];
    PEFTK_MEMBER TransposedBlock(const bf16* from, int64_t stride) { transpose_pairs(from, stride, lanes); }
};
#endif

// The product of a few rows of the input with W rows of the weight, of which `count` exist.
template <class T, class X>
struct TransposedRows {
    const X* x;  // [tokens, x_row], from interleave_parts
    int64_t x_row;
    const T* w;
    int64_t w_row, count;
    int64_t C, steps;  // the contraction, in elements and in steps
    InvariantParts parts;
    float* sums;  // scratch: [groups, tokens, W rows, W parts]
    float* c;     // [tokens, c_row]
    int64_t c_row;
};

// Prepares a row of C elements: groups of parts as [length, W parts], then what is left as it is.
template <class T, class Copy>
static void interleave_parts(int64_t steps, const InvariantParts& parts, T* to, Copy copy) {
    float* out = reinterpret_cast<float*>(to);
    for (int64_t first = 0; first < parts.grouped(); first += W * parts.length) {
        transpose_rows(W, parts.length, out + first, W, [&](int part, int64_t s, int n, float* block) {
            copy(first + part * parts.length + s, n, block);
        });
    }
    if (parts.grouped() < steps) copy(parts.grouped(), steps - parts.grouped(), out + parts.grouped());
}

// The sums of all grouped parts for kRows rows of the weight, from number `row` on.
template <class T, class X, int kTokens, int kRows>
PEFTK_TILE void sum_groups(const TransposedRows<T, X>& its, int64_t row) {
    typedef TransposedBlock<T, X> Block;
    constexpr int64_t kEach = Block::kElements / Block::kSteps;  // elements of a step
    const int64_t length = its.parts.length, stride = length * kEach, x_row = its.x_row, w_row = its.w_row;
    for (int64_t g = 0; g < its.parts.groups; g++) {
        const X* x = its.x + g * W * length;
        const T *w = its.w + row * w_row + g * W * stride, *ahead = w + kRows * w_row;
        Vec acc[kRows][kTokens];
#pragma GCC unroll 4
        for (int r = 0; r < kRows; r++) {
#pragma GCC unroll 8
            for (int i = 0; i < kTokens; i++) acc[r][i] = zero();
        }
        for (int64_t s = 0; s < length; s += Block::kSteps) {
#pragma GCC unroll 4
            for (int r = 0; r < kRows; r++) {
                // as many lines of the next rows as this block has, one after the other
#pragma GCC unroll 16
                for (int64_t e = 0; e < W * Block::kElements; e += 64 / int64_t(sizeof(T))) {
                    __builtin_prefetch(ahead + r * w_row + W * kEach * s + e, 0, 3);
                }
                const Block block(w + r * w_row + s * kEach, stride);
#pragma GCC unroll 16
                for (int j = 0; j < Block::kSteps; j++) {
#pragma GCC unroll 8
                    for (int i = 0; i < kTokens; i++) {
                        acc[r][i] = accumulate(load_lanes(x + i * x_row + (s + j) * W), block.lanes[j], acc[r][i]);
                    }
                }
            }
        }
#pragma GCC unroll 8
        for (int i = 0; i < kTokens; i++) {
#pragma GCC unroll 4
            for (int r = 0; r < kRows; r++) store(its.sums + ((g * kTokens + i) * W + row + r) * W, acc[r][i]);
        }
    }
}

// One part of `steps` steps from `first` on, with rows of the weight in the lanes. It is added to c.
template <class T, class X, int kTokens>
PEFTK_TILE void sum_part(const TransposedRows<T, X>& its, int64_t first, int64_t steps) {
    typedef TransposedBlock<T, X> Block;
    constexpr int64_t kEach = Block::kElements / Block::kSteps;
    Vec acc[kTokens];
#pragma GCC unroll 8
    for (int i = 0; i < kTokens; i++) acc[i] = zero();
    const auto multiply = [&](const Block& block, int j, int64_t s) __attribute__((always_inline)) {
#pragma GCC unroll 8
        for (int i = 0; i < kTokens; i++) {
            acc[i] = accumulate(broadcast(its.x + i * its.x_row + s), block.lanes[j], acc[i]);
        }
    };
    int64_t s = first;
    const int64_t end = first + steps;
    for (; its.count == W && s + Block::kSteps <= end && (s + Block::kSteps) * kEach <= its.C; s += Block::kSteps) {
        const Block block(its.w + s * kEach, its.w_row);
#pragma GCC unroll 16
        for (int j = 0; j < Block::kSteps; j++) multiply(block, j, s + j);
    }
    for (; s < end; s += Block::kSteps) {  // rows or steps are missing
        T copy[W * Block::kElements] = {};
        const int64_t elements = min64(Block::kElements, its.C - s * kEach);
        for (int64_t r = 0; r < its.count; r++) {
            memcpy(copy + r * Block::kElements, its.w + r * its.w_row + s * kEach, size_t(elements) * sizeof(T));
        }
        const Block block(copy, Block::kElements);
        for (int j = 0; j < min64(Block::kSteps, end - s); j++) multiply(block, j, s + j);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kTokens; i++) {
        float* total = its.c + i * its.c_row;
        store(total, first == 0 ? acc[i] : add(load(total), acc[i]));
    }
}

template <class T, class X, int kTokens>
static void transposed_tile(const TransposedRows<T, X>& its) {
    constexpr int kRows = kTransposedChains >= 4 * kTokens ? 4 : kTransposedChains >= 2 * kTokens ? 2 : 1;
    int64_t row = 0;
    for (; row + kRows <= its.count; row += kRows) sum_groups<T, X, kTokens, kRows>(its, row);
    for (; row < its.count; row++) sum_groups<T, X, kTokens, 1>(its, row);
    for (int i = 0; i < kTokens; i++) {
        Vec total = zero();
        for (int64_t g = 0; g < its.parts.groups; g++) {
            Vec sums[W];
            transpose(its.sums + (g * kTokens + i) * W * W, W, sums);
#pragma GCC unroll 16
            for (int part = 0; part < W; part++) total = g + part == 0 ? sums[0] : add(total, sums[part]);
        }
        store(its.c + i * its.c_row, total);
    }
    const int64_t length = its.parts.length;
    for (int64_t first = its.parts.grouped(); first < its.steps; first += length) {
        sum_part<T, X, kTokens>(its, first, min64(length, its.steps - first));
    }
}

template <class T, class X, int kTokens = kTransposedTokens>
static void transposed_rows(int64_t tokens, const TransposedRows<T, X>& its) {
    if (tokens == kTokens) {
        transposed_tile<T, X, kTokens>(its);
    } else if constexpr (kTokens > 1) {
        transposed_rows<T, X, kTokens - 1>(tokens, its);
    }
}

}  // namespace PEFTK_LEVEL
}  // namespace peftk
