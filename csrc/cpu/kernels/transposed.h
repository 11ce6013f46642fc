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

// The parts of a contraction in batch-invariant mode, in steps, the longest first: as many groups of W parts of 256 as
// there is room for, then of 128, 64 and 32; what is left has parts of 64, or 32 in a short contraction. Long parts
// cost many rows little. In the lanes form, `outer` has parts of 32 in fp32.
#ifdef PEFTK_PANELS
static constexpr int64_t longest_part(bool) { return 256; }
#else
static constexpr int64_t longest_part(bool pairs) { return pairs ? OuterPart<Pair>::kSteps : OuterPart<float>::kSteps; }
#endif
constexpr int64_t kShortestPart = 32;
template <class X>
constexpr bool kIsPair = false;
template <>
constexpr bool kIsPair<Pair> = true;

// Calls visit(first, count, length) for each length: `count` groups of W parts from step `first` on. Returns the first
// step that is left.
template <class Visit>
PEFTK_INLINE int64_t visit_groups(int64_t steps, bool pairs, Visit visit) {
    int64_t first = 0;
    for (int64_t length = longest_part(pairs); length >= kShortestPart; length /= 2) {
        const int64_t count = (steps - first) / (W * length);
        visit(first, count, length);
        first += count * W * length;
    }
    return first;
}

// The length of the part that begins at `first`.
static inline int64_t invariant_part(int64_t steps, bool pairs, int64_t first) {
    int64_t found = steps < 128 || longest_part(pairs) == kShortestPart ? kShortestPart : 64;
    visit_groups(steps, pairs, [&](int64_t begin, int64_t count, int64_t length) {
        if (first >= begin && first < begin + count * W * length) found = length;
    });
    return found;
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
    float* sums;       // scratch: [groups, tokens, W rows, W parts]
    float* c;          // [tokens, c_row]
    int64_t c_row;

    // Whether the weight has all elements of a group. With pairs and an odd contraction, the last step has only one.
    PEFTK_MEMBER bool has_all(int64_t first, int64_t length) const {
        constexpr int64_t kEach = TransposedBlock<T, X>::kElements / TransposedBlock<T, X>::kSteps;
        return (first + W * length) * kEach <= C;
    }
};
constexpr int64_t kSumsOfGroup = W * W;

// Prepares a row of the input: groups of parts as [length, W parts], what is left as it is.
template <class Copy>
static void interleave_parts(int64_t steps, bool pairs, float* to, Copy copy) {
    const int64_t left = visit_groups(steps, pairs, [&](int64_t begin, int64_t count, int64_t length) {
        for (int64_t first = begin; first < begin + count * W * length; first += W * length) {
            transpose_rows(W, length, to + first, W, [&](int part, int64_t s, int n, float* block) {
                copy(first + part * length + s, n, block);
            });
        }
    });
    if (left < steps) copy(left, steps - left, to + left);
}

// One group of W parts of kLength steps, from step `first` on, for kRows rows of the weight, from number `row` on.
template <class T, class X, int kTokens, int kRows, int kLength>
PEFTK_TILE void sum_group(const TransposedRows<T, X>& its, int64_t row, int64_t first, float* sums) {
    typedef TransposedBlock<T, X> Block;
    constexpr int64_t kEach = Block::kElements / Block::kSteps;  // elements of a step
    const int64_t x_row = its.x_row, w_row = its.w_row;
    const X* x = its.x + first;
    const T *w = its.w + row * w_row + first * kEach, *ahead = w + kRows * w_row;
    Vec acc[kRows][kTokens];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; r++) {
#pragma GCC unroll 8
        for (int i = 0; i < kTokens; i++) acc[r][i] = zero();
    }
    for (int64_t s = 0; s < kLength; s += Block::kSteps) {
#pragma GCC unroll 4
        for (int r = 0; r < kRows; r++) {
            // as many lines of the next rows as this block has, one after the other
#pragma GCC unroll 16
            for (int64_t e = 0; e < W * Block::kElements; e += 64 / int64_t(sizeof(T))) {
                __builtin_prefetch(ahead + r * w_row + W * kEach * s + e, 0, 3);
            }
            const Block block(w + r * w_row + s * kEach, kLength * kEach);
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
        for (int r = 0; r < kRows; r++) store(sums + i * kSumsOfGroup + (row + r) * W, acc[r][i]);
    }
}

template <class T, class X, int kTokens, int kRows>
static void sum_groups(const TransposedRows<T, X>& its, int64_t row) {
    float* sums = its.sums;
    visit_groups(its.steps, kIsPair<X>, [&](int64_t begin, int64_t count, int64_t length) {
        for (int64_t g = 0; g < count; g++, begin += W * length, sums += kTokens * kSumsOfGroup) {
            if (!its.has_all(begin, length)) continue;
            if constexpr (longest_part(kIsPair<X>) > kShortestPart) {
                switch (length) {
                    case 256: sum_group<T, X, kTokens, kRows, 256>(its, row, begin, sums); continue;
                    case 128: sum_group<T, X, kTokens, kRows, 128>(its, row, begin, sums); continue;
                    case 64: sum_group<T, X, kTokens, kRows, 64>(its, row, begin, sums); continue;
                }
            }
            sum_group<T, X, kTokens, kRows, kShortestPart>(its, row, begin, sums);
        }
    });
}

// One part of `steps` steps from `first` on, with rows of the weight in the lanes. It is added to c. x: of its first
// step; x_step: to the next one.
template <class T, class X, int kTokens>
PEFTK_TILE void sum_part(const TransposedRows<T, X>& its, const X* x, int64_t x_step, int64_t first, int64_t steps) {
    typedef TransposedBlock<T, X> Block;
    constexpr int64_t kEach = Block::kElements / Block::kSteps;
    Vec acc[kTokens];
#pragma GCC unroll 8
    for (int i = 0; i < kTokens; i++) acc[i] = zero();
    const auto multiply = [&](const Block& block, int j, int64_t s) __attribute__((always_inline)) {
#pragma GCC unroll 8
        for (int i = 0; i < kTokens; i++) {
            acc[i] = accumulate(broadcast(x + i * its.x_row + (s - first) * x_step), block.lanes[j], acc[i]);
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

// Adds the sums of a group to c [kTokens, W], part by part.
template <int kTokens>
static void add_group(const float* sums, bool fresh, float* c, int64_t c_row) {
    for (int i = 0; i < kTokens; i++) {
        Vec parts[W];
        transpose(sums + i * kSumsOfGroup, W, parts);
        Vec total = fresh ? parts[0] : add(load(c + i * c_row), parts[0]);
#pragma GCC unroll 16
        for (int part = 1; part < W; part++) total = add(total, parts[part]);
        store(c + i * c_row, total);
    }
}

template <class T, class X, int kTokens>
static void transposed_tile(const TransposedRows<T, X>& its) {
    constexpr int kRows = kTransposedChains >= 4 * kTokens ? 4 : kTransposedChains >= 2 * kTokens ? 2 : 1;
    float* sums = its.sums;
    for (int i = 0; i < kTokens; i++) store(its.c + i * its.c_row, zero());
    if (its.count == W) {
        for (int64_t row = 0; row < W; row += kRows) sum_groups<T, X, kTokens, kRows>(its, row);
    }
    int64_t first = visit_groups(its.steps, kIsPair<X>, [&](int64_t begin, int64_t count, int64_t length) {
        for (int64_t g = 0; g < count; g++, begin += W * length, sums += kTokens * kSumsOfGroup) {
            if (its.count == W && its.has_all(begin, length)) {
                add_group<kTokens>(sums, begin == 0, its.c, its.c_row);
                continue;
            }
            for (int64_t part = 0; part < W; part++) {
                sum_part<T, X, kTokens>(its, its.x + begin + part, W, begin + part * length, length);
            }
        }
    });
    while (first < its.steps) {
        const int64_t length = min64(invariant_part(its.steps, kIsPair<X>, first), its.steps - first);
        sum_part<T, X, kTokens>(its, its.x + first, 1, first, length);
        first += length;
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
