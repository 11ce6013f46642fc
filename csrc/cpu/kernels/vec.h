// A SIMD register of W floats for the level that is being compiled, with the same few operations at every level:
//
//   W, Vec; zero, set1, load, store, add, mul, fma, reduce (the sum of the lanes)
//   load of bf16 and f16 with exact widening, store with rounding to nearest even (NaN stays NaN, subnormals are kept)
//   load_even, load_odd: every second of 2W bf16, with one instruction in addition to the load
//   load_n, store_n: the first n < W elements; the others are read as 0, and not written
//   transpose: a W x W block to W registers of fp32 (from fp32: also of any other 32-bit values)
//   for packed weights: load of int8, set1 of f16 and bf16; load_codes: W bytes of two 4-bit codes each, of whose low
//   and high halves Lookup4 (a table of 16, times a scale) and Linear4 ((code - zero) * scale, zero 8 if it is left
//   out) make floats; zip: W even and W odd elements to their order
//   with PEFTK_DP: dp(acc, a, b), acc[i] += a[2i] b[2i] + a[2i+1] b[2i+1] for bf16 pairs in 32-bit lanes
//
// Everything is static and inside the level's namespace (see common/dtype.h for why).
#pragma once

#include "common/dtype.h"

#define PEFTK_INLINE static inline __attribute__((always_inline))
#define PEFTK_MEMBER inline __attribute__((always_inline))

// #if cannot compare names, so each level has a number.
#define PEFTK_NUMBER_portable 0
#define PEFTK_NUMBER_avx2 1
#define PEFTK_NUMBER_avx512 2
#define PEFTK_NUMBER_avx512_bf16 3
#define PEFTK_NUMBER_neon 4
#define PEFTK_JOIN_(a, b) a##b
#define PEFTK_JOIN(a, b) PEFTK_JOIN_(a, b)
#define PEFTK_LEVEL_NUMBER PEFTK_JOIN(PEFTK_NUMBER_, PEFTK_LEVEL)

#if PEFTK_LEVEL_NUMBER == 1
#include "cpu/kernels/vec_avx2.h"
#elif PEFTK_LEVEL_NUMBER == 2 || PEFTK_LEVEL_NUMBER == 3
#include "cpu/kernels/vec_avx512.h"
#elif PEFTK_LEVEL_NUMBER == 4
#include "cpu/kernels/vec_neon.h"
#else
#include "cpu/kernels/vec_portable.h"
#endif
