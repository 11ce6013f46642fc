// One row of the checksum. Plain loops: the compiler makes 32 x 32 -> 64-bit multiply-adds of them at every level.
#include "cpu/checksum.h"

namespace peftk {
namespace PEFTK_LEVEL {
namespace {

template <class Bits>
void inspect_bits(const Bits* bits, int64_t K, Bits exponent, Inspection* result) {
    uint64_t sum = 0;
    uint32_t not_finite = 0;
    for (int64_t j = 0; j < K; j++) {
        const uint32_t place = (uint32_t(j) * 0x9E3779B1u) | 1;
        sum += uint64_t(uint32_t(bits[j])) * place;
        not_finite |= Bits(bits[j] & exponent) == exponent;
    }
    *result = {sum, not_finite == 0};
}

}  // namespace

void inspect_row(const void* row, int64_t K, Dtype dtype, Inspection* result) {
    if (dtype == kFloat32) {
        inspect_bits<uint32_t>(static_cast<const uint32_t*>(row), K, 0x7F800000u, result);
    } else {
        const uint16_t exponent = dtype == kBFloat16 ? 0x7F80 : 0x7C00;
        inspect_bits<uint16_t>(static_cast<const uint16_t*>(row), K, exponent, result);
    }
}

}  // namespace PEFTK_LEVEL
}  // namespace peftk
