// Converts the codes of a merge from one byte each to a receipt's two per byte, and back (common/merge.h,
// docs/merge.md).

#include "cpu/kernels/vec.h"
#include "cpu/merge.h"

namespace peftk {
namespace PEFTK_LEVEL {
namespace {

// A register of codes, as lanes of 8 bits or as pairs in lanes of 16 bits, and half a register of halves.
constexpr int64_t kCodes = 4 * W;
typedef int8_t Codes __attribute__((vector_size(kCodes)));
typedef uint8_t Bytes __attribute__((vector_size(kCodes)));
typedef uint16_t Pairs __attribute__((vector_size(kCodes)));
typedef uint8_t Halves __attribute__((vector_size(kCodes / 2)));
static_assert(kMergeGroup % kCodes == 0);

// One bit per lane, for lanes that are all ones or all zeros.
PEFTK_INLINE uint64_t mask_of(Bytes lanes) {
#if PEFTK_LEVEL_NUMBER == 2 || PEFTK_LEVEL_NUMBER == 3
    return _mm512_movepi8_mask((__m512i)lanes);
#elif PEFTK_LEVEL_NUMBER == 1
    return uint32_t(_mm256_movemask_epi8((__m256i)lanes));
#else
    uint64_t mask = 0;
    const Bytes none{};
    if (memcmp(&lanes, &none, sizeof lanes) == 0) return 0;
    for (int i = 0; i < kCodes; i++) mask |= uint64_t(lanes[i] & 1) << i;
    return mask;
#endif
}

// Read and write at most `bytes` bytes. Those beyond are read as 0, and not written.
template <class V>
PEFTK_INLINE V read_up_to(const uint8_t* from, int64_t bytes) {
    V v{};
    bytes < int64_t(sizeof v) ? memcpy(&v, from, bytes)
                              : memcpy(&v, from, sizeof v);  // a call, or a single instruction
    return v;
}
template <class V>
PEFTK_INLINE void write_up_to(uint8_t* to, V v, int64_t bytes) {
    bytes < int64_t(sizeof v) ? memcpy(to, &v, bytes) : memcpy(to, &v, sizeof v);
}

}  // namespace

void merge_pack_codes(const int8_t* code, int64_t K, uint8_t* halves, int8_t* far, int64_t* far_count) {
    using namespace merge_code;
    const int64_t bytes = (K + 1) / 2;
    int64_t count = *far_count;
    for (int64_t j = 0; j < K; j += kCodes) {
        Bytes codes;
        memcpy(&codes, code + j, sizeof codes);
        const Bytes near = (Bytes)((Bytes)(codes - uint8_t(kHalfFarthest)) < uint8_t(kHalfFar - kHalfFarthest));
        const Bytes zero = (Bytes)(codes == uint8_t(kZero));
        const Bytes half = (codes & near) | (uint8_t(kHalfFar) & ~near & ~zero) | (uint8_t(kHalfZero) & zero);
        const Pairs pair = (Pairs)half;
        const Pairs packed = (pair & 0x0f) | (pair >> 4 & 0xf0);
        write_up_to(halves + j / 2, __builtin_convertvector(packed, Halves), bytes - j / 2);
        for (uint64_t left = mask_of(~near & ~zero); left; left &= left - 1)
            far[count++] = code[j + __builtin_ctzll(left)];
    }
    *far_count = count;
}

void merge_unpack_codes(const uint8_t* halves, int64_t K, const int8_t* far, int8_t* code, int64_t* far_count) {
    using namespace merge_code;
    const int64_t bytes = (K + 1) / 2;
    int64_t count = *far_count;
    for (int64_t j = 0; j < K; j += kCodes) {
        const Pairs packed = __builtin_convertvector(read_up_to<Halves>(halves + j / 2, bytes - j / 2), Pairs);
        const Bytes half = (Bytes)((packed & 0x0f) | (packed & 0xf0) << 4);
        const Bytes extended = (half ^ uint8_t(8)) - uint8_t(8);
        const Bytes zero = (Bytes)(half == uint8_t(kHalfZero & 0x0f));
        const Bytes codes = (extended & ~zero) | (uint8_t(kZero) & zero);
        memcpy(code + j, &codes, sizeof codes);
        uint64_t left = mask_of((Bytes)(half == uint8_t(kHalfFar)));
        for (; left; left &= left - 1) code[j + __builtin_ctzll(left)] = far[count++];
    }
    *far_count = count;
}

void merge_count_far(const uint8_t* halves, int64_t bytes, int64_t* far_count) {
    using namespace merge_code;
    int64_t count = 0;
    for (int64_t i = 0; i < bytes; i += kCodes) {
        const Bytes both = read_up_to<Bytes>(halves + i, bytes - i);
        count += __builtin_popcountll(mask_of((Bytes)((both & 0x0f) == uint8_t(kHalfFar))));
        count += __builtin_popcountll(mask_of((Bytes)(both >> 4 == uint8_t(kHalfFar))));
    }
    *far_count = count;
}

}  // namespace PEFTK_LEVEL
}  // namespace peftk
