// A checksum of a matrix's bits, and whether all its values are finite: one pass. Specification:
// peftk/reference/merge.py.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "cpu/levels.h"

namespace peftk {

struct Inspection {
    uint64_t checksum;
    bool finite;
};

// One row at one level: Σ_j bits[j] · ((j · 0x9E3779B1 mod 2³²) | 1), modulo 2⁶⁴.
PEFTK_DECLARE(void, inspect_row, (const void* row, int64_t K, Dtype dtype, Inspection* result))

// Σ_n row(n) · ((n · 0x9E3779B97F4A7C15) | 1), modulo 2⁶⁴.
Inspection inspect(const void* weight, int64_t stride, int64_t N, int64_t K, Dtype dtype, int threads);

}  // namespace peftk
