// The checksum of one row: plain loops, which the compiler vectorizes.
#include "cpu/checksum.h"

namespace peftk {
namespace PEFTK_LEVEL {
namespace {

// 16-bit values: a single instruction multiplies a register of them and adds pairs.
uint32_t sum_of(const int16_t* bits, int64_t K) {
    uint32_t sum = 0;
    uint16_t place = 1;
    for (int64_t j = 0; j < K; j++, place += 2) sum += uint32_t(int32_t(bits[j]) * int32_t(int16_t(place)));
    return sum;
}

uint32_t sum_of(const uint32_t* bits, int64_t K) {
    uint32_t sum = 0, place = 1;
    for (int64_t j = 0; j < K; j++, place += 2) sum += bits[j] * place;
    return sum;
}

}  // namespace

void row_checksum(const void* row, int64_t K, Dtype dtype, uint32_t* sum) {
    *sum =
        dtype == kFloat32 ? sum_of(static_cast<const uint32_t*>(row), K) : sum_of(static_cast<const int16_t*>(row), K);
}

}  // namespace PEFTK_LEVEL
}  // namespace peftk
