// The processor's peak: only multiply-adds, in as many independent chains as the product's tile has accumulators.
#include "cpu/peak.h"

#include "cpu/kernels/micro.h"

namespace peftk {
namespace PEFTK_LEVEL {
namespace {

constexpr int kChains = 2 * kRowsOfTwo;

// A step of a chain multiplies its value: the compiler could move a product of two constants out of the loop.
PEFTK_INLINE Vec chain_step(Vec value, Vec factor) { return fma(value, factor, factor); }
#ifdef PEFTK_DP
PEFTK_INLINE Vec chain_step(Vec value, __m512i pairs) { return dp(value, pairs, pairs); }
#endif

template <class Factor>
float run_chains(int64_t steps, Factor factor) {
    Vec value[kChains];
#pragma GCC unroll 32
    for (int i = 0; i < kChains; i++)
        value[i] = set1(float(i));  // all different, so that the compiler cannot combine equal chains
    for (int64_t s = 0; s < steps; s++) {
#pragma GCC unroll 32
        for (int i = 0; i < kChains; i++) value[i] = chain_step(value[i], factor);
    }
    Vec sum = zero();
    for (int i = 0; i < kChains; i++) sum = add(sum, value[i]);
    return reduce(sum);
}

}  // namespace

void fma_chains(int64_t multiply_adds, [[maybe_unused]] bool pairs, float* sum) {
    constexpr int64_t step = kChains * W;
#ifdef PEFTK_DP
    if (pairs) {
        *sum = run_chains((multiply_adds + 2 * step - 1) / (2 * step), set1_pair(float_to_bits(*sum)));
        return;
    }
#endif
    *sum = run_chains((multiply_adds + step - 1) / step, set1(*sum));
}

// Reads eight streams at once, which the prefetchers follow. On Zen 5, two threads, AVX-512, 32 / 64 MiB: one stream
// read 72 / 66 GB/s, eight read 147 / 96. Six or twelve streams were slower, and software prefetching gained nothing.
void read_lines(const void* from, int64_t bytes, uint64_t* sum) {
    typedef uint64_t Words __attribute__((vector_size(4 * W), aligned(8), may_alias));
    constexpr int64_t kStreams = 8, kSums = 8, kLine = 64, kSize = sizeof(Words);
    const char* memory = static_cast<const char*>(from);
    const int64_t stream = bytes / (kStreams * kLine) * kLine;
    Words sums[kSums] = {};
    for (int64_t i = 0; i < stream; i += kLine) {
#pragma GCC unroll 8
        for (int64_t s = 0; s < kStreams; s++) {
#pragma GCC unroll 4
            for (int64_t j = 0; j < kLine; j += kSize) {
                sums[(s + j / kSize) % kSums] += *reinterpret_cast<const Words*>(memory + s * stream + i + j);
            }
        }
    }
    uint64_t total = 0;
    for (const Words& part : sums) {
        for (int w = 0; w < W / 2; w++) total += part[w];
    }
    for (int64_t i = kStreams * stream; i + 8 <= bytes; i += 8) {
        uint64_t word;
        memcpy(&word, memory + i, 8);
        total += word;
    }
    *sum = total;
}

}  // namespace PEFTK_LEVEL
}  // namespace peftk
