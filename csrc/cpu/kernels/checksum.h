// The sum of a row's bits: plain loops, which the compiler vectorizes.
#pragma once

#include "common/dtype.h"

namespace peftk {
namespace PEFTK_LEVEL {
namespace {

// Σ_j bits[j] · (2j + 1) modulo 2³² over `count` columns, of which the first is column `first` of the row. 16-bit
// values and factors are signed: a single instruction multiplies a register of them and adds pairs.
inline uint32_t sum_of_bits(const int16_t* bits, int64_t first, int64_t count) {
    uint32_t sum = 0;
    uint16_t place = uint16_t(2 * first + 1);
    for (int64_t j = 0; j < count; j++, place += 2) sum += uint32_t(int32_t(bits[j]) * int32_t(int16_t(place)));
    return sum;
}

inline uint32_t sum_of_bits(const uint32_t* bits, int64_t first, int64_t count) {
    uint32_t sum = 0, place = uint32_t(2 * first + 1);
    for (int64_t j = 0; j < count; j++, place += 2) sum += bits[j] * place;
    return sum;
}

inline uint32_t sum_of_bits(const void* columns, Dtype dtype, int64_t first, int64_t count) {
    return dtype == kFloat32 ? sum_of_bits(static_cast<const uint32_t*>(columns), first, count)
                             : sum_of_bits(static_cast<const int16_t*>(columns), first, count);
}

}  // namespace
}  // namespace PEFTK_LEVEL
}  // namespace peftk
