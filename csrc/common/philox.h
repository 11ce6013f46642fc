// Dropout masks from a counter: Philox4x32-10, with the same bits as peftk/reference/philox.py.
//
// Element (m, k) of [M, K] has the number e = m·K + k and uses word e % 4 of the block with counter e / 4.
#pragma once

#include <cstdint>

namespace peftk {

// The words of blocks first … first + 15, in the order of their elements.
static inline void philox_16_blocks(uint64_t first, uint64_t seed, uint32_t words[64]) {
    // 64-bit lanes with 32-bit values, so that the compiler vectorizes the multiplications
    uint64_t c0[16], c1[16], c2[16], c3[16];
    for (int j = 0; j < 16; j++) {
        c0[j] = (first + j) & 0xffffffff;
        c1[j] = (first + j) >> 32;
        c2[j] = c3[j] = 0;
    }
    uint64_t k0 = seed & 0xffffffff, k1 = seed >> 32;
    for (int round = 0; round < 10; round++) {
        for (int j = 0; j < 16; j++) {
            const uint64_t p0 = (c0[j] & 0xffffffff) * 0xD2511F53u, p1 = (c2[j] & 0xffffffff) * 0xCD9E8D57u;
            c0[j] = (p1 >> 32) ^ c1[j] ^ k0;
            c1[j] = p1 & 0xffffffff;
            c2[j] = (p0 >> 32) ^ c3[j] ^ k1;
            c3[j] = p0 & 0xffffffff;
        }
        k0 = (k0 + 0x9E3779B9u) & 0xffffffff;
        k1 = (k1 + 0xBB67AE85u) & 0xffffffff;
    }
    for (int j = 0; j < 16; j++) {
        words[4 * j] = uint32_t(c0[j]);
        words[4 * j + 1] = uint32_t(c1[j]);
        words[4 * j + 2] = uint32_t(c2[j]);
        words[4 * j + 3] = uint32_t(c3[j]);
    }
}

}  // namespace peftk
