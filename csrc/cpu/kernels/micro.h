// The two register-tiled kernels that everything is made of.
//
// outer: lanes are `vectors` registers of one operand, the other is broadcast: c[i][lane] += Σ_s b[i][s] l[s][lane].
// dot:   lanes run along the contraction: out[i][j] = Σ_k x[i][k] w[j][k].
//
// Every output is one chain of fma in ascending order (dot: one chain a lane, then the sum of the lanes), whatever the
// tile it falls into: results don't depend on how the work is cut.
#pragma once

#include "cpu/kernels/vec.h"

namespace peftk {
namespace PEFTK_LEVEL {

// Two consecutive bf16 of the contraction in one 32-bit lane, as the dot-product instruction takes them.
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

template <class T>
struct Operand {
    const T* data;
    int64_t row, step;
};

template <class T, int kRows, int kVectors>
static void outer_tile(Operand<T> b, const T* l, int64_t l_step, int64_t steps, float* c, int64_t c_row, bool fresh) {
    Vec acc[kRows][kVectors];
    for (int i = 0; i < kRows; i++) {
        for (int v = 0; v < kVectors; v++) acc[i][v] = fresh ? zero() : load(c + i * c_row + v * W);
    }
    const T* rows = b.data;
    for (int64_t s = 0; s < steps; s++, rows += b.step, l += l_step) {
        decltype(load_lanes(l)) lanes[kVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; v++) lanes[v] = load_lanes(l + v * W);
#pragma GCC unroll 16
        for (int i = 0; i < kRows; i++) {
            const auto value = broadcast(rows + i * b.row);
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; v++) acc[i][v] = accumulate(value, lanes[v], acc[i][v]);
        }
    }
    for (int i = 0; i < kRows; i++) {
        for (int v = 0; v < kVectors; v++) store(c + i * c_row + v * W, acc[i][v]);
    }
}

template <class T, int kRows, int kVectors>
static void outer_rows(int rows, Operand<T> b, const T* l, int64_t l_step, int64_t steps, float* c, int64_t c_row,
                       bool fresh) {
    if (rows == kRows) {
        outer_tile<T, kRows, kVectors>(b, l, l_step, steps, c, c_row, fresh);
    } else if constexpr (kRows > 1) {
        outer_rows<T, kRows - 1, kVectors>(rows, b, l, l_step, steps, c, c_row, fresh);
    }
}

template <class T, int kVectors>
static void outer_panel(int64_t rows, Operand<T> b, const T* l, int64_t l_step, int64_t steps, float* c, int64_t c_row,
                        bool fresh) {
    for (; rows >= kMaxRows; rows -= kMaxRows, b.data += kMaxRows * b.row, c += kMaxRows * c_row) {
        outer_tile<T, kMaxRows, kVectors>(b, l, l_step, steps, c, c_row, fresh);
    }
    if (rows > 0) outer_rows<T, kMaxRows - 1, kVectors>(int(rows), b, l, l_step, steps, c, c_row, fresh);
}

// rows of b times one panel of `vectors` <= kMaxVectors registers; c [rows, c_row] is started anew if `fresh`.
template <class T>
static void outer(int64_t rows, int vectors, Operand<T> b, const T* l, int64_t l_step, int64_t steps, float* c,
                  int64_t c_row, bool fresh) {
    static_assert(kMaxVectors == 2, "one branch for each");
    if (vectors == 2) {
        outer_panel<T, 2>(rows, b, l, l_step, steps, c, c_row, fresh);
    } else {
        outer_panel<T, 1>(rows, b, l, l_step, steps, c, c_row, fresh);
    }
}

template <class T, class U>
struct DotStep {
    static constexpr int kElements = W;
    PEFTK_INLINE Vec first(const T* p) { return load(p); }
    PEFTK_INLINE Vec first_n(const T* p, int n) { return load_n(p, n); }
    PEFTK_INLINE Vec second(const U* p) { return load(p); }
    PEFTK_INLINE Vec second_n(const U* p, int n) { return load_n(p, n); }
};

#ifdef PEFTK_DP
template <>
struct DotStep<bf16, bf16> {
    static constexpr int kElements = 2 * W;
    PEFTK_INLINE __m512i first(const bf16* p) { return load_pairs(p); }
    PEFTK_INLINE __m512i first_n(const bf16* p, int n) { return load_pairs_n(p, n); }
    PEFTK_INLINE __m512i second(const bf16* p) { return load_pairs(p); }
    PEFTK_INLINE __m512i second_n(const bf16* p, int n) { return load_pairs_n(p, n); }
};
#endif

template <class T, class U, int kTokens, int kRows>
static void dot_tile(const T* const* x, const U* w, int64_t w_row, int64_t K, float* out, int64_t out_row) {
    typedef DotStep<T, U> Step;
    Vec acc[kTokens][kRows];
    for (int i = 0; i < kTokens; i++) {
        for (int j = 0; j < kRows; j++) acc[i][j] = zero();
    }
    int64_t k = 0;
    for (; k + Step::kElements <= K; k += Step::kElements) {
        decltype(Step::first(x[0])) first[kTokens];
#pragma GCC unroll 8
        for (int i = 0; i < kTokens; i++) first[i] = Step::first(x[i] + k);
#pragma GCC unroll 8
        for (int j = 0; j < kRows; j++) {
            const auto second = Step::second(w + j * w_row + k);
#pragma GCC unroll 8
            for (int i = 0; i < kTokens; i++) acc[i][j] = accumulate(first[i], second, acc[i][j]);
        }
    }
    if (const int rest = int(K - k)) {
        for (int j = 0; j < kRows; j++) {
            const auto second = Step::second_n(w + j * w_row + k, rest);
            for (int i = 0; i < kTokens; i++) acc[i][j] = accumulate(Step::first_n(x[i] + k, rest), second, acc[i][j]);
        }
    }
    for (int i = 0; i < kTokens; i++) {
        for (int j = 0; j < kRows; j++) out[i * out_row + j] = reduce(acc[i][j]);
    }
}

template <class T, class U, int kTokens, int kRows>
static void dot_tokens(int64_t tokens, const T* const* x, const U* w, int64_t w_row, int64_t K, float* out,
                       int64_t out_row) {
    for (; tokens >= kTokens; tokens -= kTokens, x += kTokens, out += kTokens * out_row) {
        dot_tile<T, U, kTokens, kRows>(x, w, w_row, K, out, out_row);
    }
    if constexpr (kTokens > 1) dot_tokens<T, U, kTokens - 1, kRows>(tokens, x, w, w_row, K, out, out_row);
}

// out [tokens, out_row] = rows x[i] times `rows` rows of w.
template <class T, class U>
static void dot(int64_t tokens, const T* const* x, int64_t rows, const U* w, int64_t w_row, int64_t K, float* out,
                int64_t out_row) {
    for (; rows >= kDotRows; rows -= kDotRows, w += kDotRows * w_row, out += kDotRows) {
        dot_tokens<T, U, kDotTokens, kDotRows>(tokens, x, w, w_row, K, out, out_row);
    }
    for (; rows > 0; rows--, w += w_row, out++) dot_tokens<T, U, kDotTokens, 1>(tokens, x, w, w_row, K, out, out_row);
}

}  // namespace PEFTK_LEVEL
}  // namespace peftk
