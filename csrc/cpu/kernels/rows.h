// Converts rows of a matrix to the forms that the micro-kernels read: widened, with dropout, transposed, in pairs.
#pragma once

#include "common/philox.h"
#include "cpu/kernels/micro.h"
#include "cpu/lora_linear.h"

namespace peftk {
namespace PEFTK_LEVEL {

static inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Calls f with a value of the type that `dtype` names.
template <class F>
static inline void with_type(int dtype, F f) {
    switch (dtype) {
        case kFloat32: return f(float{});
        case kBFloat16: return f(bf16{});
        default: return f(f16{});
    }
}

// The address of an element of a matrix whose dtype is known at run time.
static inline const void* at(const void* base, int dtype, int64_t element) {
    return static_cast<const char*>(base) + element * size_of(dtype);
}
static inline void* at(void* base, int dtype, int64_t element) {
    return static_cast<char*>(base) + element * size_of(dtype);
}

// Widens n contiguous elements to fp32. Writes whole registers: up to W - 1 zeros after the last element.
template <class T>
static void widen(const T* from, int64_t n, float* to) {
    int64_t i = 0;
    for (; i + W <= n; i += W) store(to + i, load(from + i));
    if (i < n) store(to + i, load_n(from + i, int(n - i)));
}

static inline void widen(const void* from, int dtype, int64_t n, float* to) {
    with_type(dtype, [&](auto type) { widen(static_cast<const decltype(type)*>(from), n, to); });
}

// Converts n contiguous elements to EvenOdd. Writes whole blocks.
template <class T>
static void split_even_odd(const T* from, int64_t n, float* to) {
    for (int64_t i = 0; i < n; i += 2 * W) {
        float block[2 * W];
        for (int half = 0; half < 2 * W; half += W) {
            const int64_t left = n - i - half;
            store(block + half, left >= W  ? load(from + i + half)
                                : left > 0 ? load_n(from + i + half, int(left))
                                           : zero());
        }
        for (int j = 0; j < W; j++) {
            to[i + j] = block[2 * j];
            to[i + W + j] = block[2 * j + 1];
        }
    }
}

// Rounds n contiguous fp32 elements to dtype.
static inline void narrow(const float* from, int64_t n, void* to, int dtype) {
    with_type(dtype, [&](auto type) {
        auto* out = static_cast<decltype(type)*>(to);
        int64_t i = 0;
        for (; i + W <= n; i += W) store(out + i, load(from + i));
        if (i < n) store_n(out + i, load_n(from + i, int(n - i)), int(n - i));
    });
}

// Applies dropout to columns first … first + n - 1 of row m of [M, columns]: kept elements are scaled, others become 0.
[[maybe_unused]] static void apply_dropout(const Dropout& dropout, int64_t m, int64_t columns, int64_t first, int64_t n,
                                           float* row) {
    uint64_t element = uint64_t(m) * uint64_t(columns) + uint64_t(first);
    uint32_t words[64];
    for (int64_t i = 0; i < n;) {
        const int skip = int(element % 4), take = int(min64(64 - skip, n - i));
        philox_16_blocks(element / 4, dropout.seed, words);
        for (int j = 0; j < take; j++) {
            row[i + j] = words[skip + j] < dropout.threshold ? 0.0f : row[i + j] * dropout.scale;
        }
        i += take;
        element += take;
    }
}

// Transposes a W x W block to memory.
template <class T>
PEFTK_INLINE void transpose(const T* from, int64_t from_stride, float* to, int64_t to_stride) {
    Vec transposed[W];
    transpose(from, from_stride, transposed);
#pragma GCC unroll 16
    for (int j = 0; j < W; j++) store(to + j * to_stride, transposed[j]);
}

// Transposes `lanes` rows (at most W) of n 32-bit elements to [n, to_step]: element s of row i goes to
// to[s * to_step + i]. Missing rows become zeros. `copy(i, s, count, buffer)` writes elements s … s + count - 1 of row
// i, and zeros after them, to a buffer of W elements.
template <class Copy>
static inline void transpose_rows(int lanes, int64_t n, float* to, int64_t to_step, Copy copy) {
    alignas(64) float block[W * W], transposed[W * W];
    for (int64_t s = 0; s < n; s += W) {
        const int count = int(min64(W, n - s));
        for (int i = 0; i < lanes; i++) copy(i, s, count, block + i * W);
        for (int i = lanes; i < W; i++) store(block + i * W, zero());
        if (count == W) {
            transpose(block, W, to + s * to_step, to_step);
        } else {
            transpose(block, W, transposed, W);
            for (int j = 0; j < count; j++) store(to + (s + j) * to_step, load(transposed + j * W));
        }
    }
}

#ifdef PEFTK_DP
// Copies n bf16 as (n + 1) / 2 pairs, the last one with a zero if n is odd. Writes whole registers.
[[maybe_unused]] static void copy_pairs(const bf16* from, int64_t n, Pair* to) {
    int64_t i = 0;
    for (; i + 2 * W <= n; i += 2 * W) _mm512_storeu_si512(to + i / 2, load_pairs(from + i));
    if (i < n) _mm512_storeu_si512(to + i / 2, load_pairs_n(from + i, int(n - i)));
}
#endif

}  // namespace PEFTK_LEVEL
}  // namespace peftk
