// The checksum of a matrix's bits. Specification: peftk/reference/merge.py.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "cpu/levels.h"

namespace peftk {

// Rows at one SIMD level, for each Σ_j bits[j] · (2j + 1) modulo 2³²; 16-bit factors are signed.
PEFTK_DECLARE(void, row_checksums,
              (const void* weight, int64_t row_bytes, int64_t rows, int64_t K, Dtype dtype, uint32_t* sums))

// The share of row n, modulo 2⁶⁴.
static inline uint64_t checksum_share(int64_t n, uint32_t row_sum) {
    return row_sum * ((uint64_t(n) * 0x9E3779B97F4A7C15u) | 1);
}

// The checksum of all rows.
uint64_t checksum(const void* weight, int64_t stride, int64_t N, int64_t K, Dtype dtype, int threads);

}  // namespace peftk
