// The checksum of a matrix's bits. Specification: peftk/reference/merge.py.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "cpu/levels.h"

namespace peftk {

// One row at one SIMD level: Σ_j bits[j] · (2j + 1) modulo 2³²; 16-bit factors are signed.
PEFTK_DECLARE(void, row_checksum, (const void* row, int64_t K, Dtype dtype, uint32_t* sum))

// The share of rows first … first + rows - 1: Σ_n row(n) · ((n · 0x9E3779B97F4A7C15) | 1) modulo 2⁶⁴.
uint64_t checksum_of_rows(Level level, const void* weight, int64_t stride, int64_t first, int64_t rows, int64_t K,
                          Dtype dtype);

// The checksum of all rows.
uint64_t checksum(const void* weight, int64_t stride, int64_t N, int64_t K, Dtype dtype, int threads);

}  // namespace peftk
