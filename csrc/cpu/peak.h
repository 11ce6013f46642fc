// Measures the machine's two limits: multiply-adds in registers, and reading memory. `peftk bench --suite cpu` runs
// them in turns with the kernels that it measures.
#pragma once

#include <cstdint>

#include "cpu/levels.h"

namespace peftk {

// One thread at one level. sum: an operand, and then the result, so that the compiler cannot remove the work.
PEFTK_DECLARE(void, fma_chains, (int64_t multiply_adds, bool pairs, float* sum))
PEFTK_DECLARE(void, read_lines, (const void* from, int64_t bytes, uint64_t* sum))

// Runs at least `multiply_adds` at the level in use: of fp32, or of bf16 pairs if dtype is bf16 and the level has them.
void fma_peak(int64_t multiply_adds, int dtype, int threads);
// The sum of all whole 64-bit words.
uint64_t read_peak(const void* from, int64_t bytes, int threads);

}  // namespace peftk
