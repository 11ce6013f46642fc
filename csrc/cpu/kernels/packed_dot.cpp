// The dot form over a packed W, in a file of its own because it is compiled for every format.
#include "cpu/kernels/packed.h"

namespace peftk {
namespace PEFTK_LEVEL {

template <class T, int kCodes, class S>
struct DotStep<T, PackedRow<kCodes, S>> : PackedStep<kCodes, S> {
    typedef PackedRow<kCodes, S> Row;
    typedef PackedStep<kCodes, S> Step;
    static constexpr bool kDecodes = true;
    static constexpr int kElements = kPackedStep, kRegisters = Step::kRegisters, kUnit = 2 * W;
    static constexpr int kLine = kCodes == kInt8 || kCodes == kBlocks8 ? 64 : 128;  // elements of about a cache line

    PEFTK_INLINE Vec first(const T* p, int r) { return load(reinterpret_cast<const float*>(p) + r * W); }
    PEFTK_INLINE Vec first_n(const T* p, int r, int n) {
        const float* from = reinterpret_cast<const float*>(p) + r * W;
        const int left = n - r * W;
        return left >= W ? load(from) : left > 0 ? load_n(from, left) : zero();
    }
    PEFTK_INLINE void fetch(const Row& row, int64_t k) {
        __builtin_prefetch(Step::at(row, k), 0, 3);
        if (Step::kHasBlocks) __builtin_prefetch(Step::at(row, k) + 64, 0, 3);  // kLine elements have 68 or 72 bytes
    }
};

// Decoding takes so many instructions that loads alone do not run far ahead. On an Ice Lake server, d = 4096, two
// threads, 512 bytes ahead took 10 to 17 % off the time of one token.
template <int kCodes, class S>
PEFTK_INLINE PackedRow<kCodes, S> ahead_in_stream(const PackedRow<kCodes, S>& row) {
    return {row.codes + 512, row.scales, row.zeros, row.packing};
}

void packed_dot(const LinearOp& op, int64_t tokens, const void* const* x, int64_t row, int64_t count, float* out,
                int64_t out_row) {
    with_packed_row(op, row, [&](const auto& first) {
        typedef std::remove_const_t<std::remove_reference_t<decltype(first)>> Row;
        typedef std::conditional_t<Row::kPackedCodes == kPairs, EvenOdd, float> T;
        dot(tokens, reinterpret_cast<const T* const*>(x), count, first, 1, op.C, out, out_row, first + count);
    });
}

}  // namespace PEFTK_LEVEL
}  // namespace peftk
