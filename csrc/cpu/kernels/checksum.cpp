#include "cpu/kernels/checksum.h"

#include "cpu/checksum.h"

namespace peftk {
namespace PEFTK_LEVEL {

void row_checksums(const void* weight, int64_t row_bytes, int64_t rows, int64_t K, Dtype dtype, uint32_t* sums) {
    const int64_t segment = 256 / size_of(dtype);  // of one row after the other: the processor fetches ahead in each
    const char* const from = static_cast<const char*>(weight);
    for (int64_t i = 0; i < rows; i++) sums[i] = 0;
    for (int64_t j = 0; j < K; j += segment) {
        const int64_t count = K - j < segment ? K - j : segment;
        for (int64_t i = 0; i < rows; i++) {
            sums[i] += sum_of_bits(from + i * row_bytes + j * size_of(dtype), dtype, j, count);
        }
    }
}

}  // namespace PEFTK_LEVEL
}  // namespace peftk
