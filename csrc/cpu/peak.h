// The two bounds of every kernel, by themselves: multiply-adds that touch only registers, and reading that does nothing
// else. `peftk bench --suite cpu` lets them take turns with what it measures.
#pragma once

#include <cstdint>

#include "cpu/levels.h"

namespace peftk {

// One thread at one level. sum: an operand going in, and what keeps the compiler from leaving the work out.
PEFTK_DECLARE(void, fma_chains, (int64_t multiply_adds, bool pairs, float* sum))
PEFTK_DECLARE(void, read_lines, (const void* from, int64_t bytes, uint64_t* sum))

// At the level in use: at least so many multiply-adds, of fp32, or of bf16 pairs where dtype is bf16 and the level can.
void fma_peak(int64_t multiply_adds, int dtype, int threads);
// The sum of all 64-bit words, whole ones only.
uint64_t read_peak(const void* from, int64_t bytes, int threads);

}  // namespace peftk
