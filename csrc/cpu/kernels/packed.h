// Reads a packed W (Packing): decodes elements of its rows to fp32, exactly as their format says, in registers.
//
// A step is 32 elements, which share a scale. The dot form decodes steps as it multiplies; the other forms decode where
// they would widen 16 bits (read_weight). Everything else in the kernels is the same for a packed W.
#pragma once

#include "cpu/kernels/linear.h"

namespace peftk {
namespace PEFTK_LEVEL {

constexpr int kPackedStep = 32;

// A row of W. Adding n gives the row n rows on. S: the type of the scales, which are not read if there are blocks.
template <int kCodes, class S>
struct PackedRow {
    static constexpr int kPackedCodes = kCodes;
    const uint8_t* codes;
    const S* scales;
    const uint8_t* zeros;
    const Packing* packing;

    PEFTK_MEMBER PackedRow operator+(int64_t n) const {
        const int64_t groups = n * packing->groups;
        return {codes + n * packing->row_bytes, scales + groups, zeros ? zeros + groups : nullptr, packing};
    }
};

// Elements k … k + 31 of a row, to 32 / W registers. Those of kPairs alternate: W even elements, W odd elements.
template <int kCodes, class S>
struct PackedStep {
    typedef PackedRow<kCodes, S> Row;
    static constexpr int kRegisters = kPackedStep / W;
    static constexpr bool kHasBlocks = kCodes == kBlocks8 || kCodes == kBlocks4;

    PEFTK_INLINE const uint8_t* at(const Row& row, int64_t k) {
        return row.codes + (kCodes == kInt8      ? k
                            : kCodes == kBlocks8 ? (k >> 5) * 34
                            : kCodes == kBlocks4 ? (k >> 5) * 18
                                                 : k >> 1);
    }
    PEFTK_INLINE Vec scale(const Row& row, const uint8_t* p, int64_t group) {
        if constexpr (kHasBlocks) {
            f16 scale;
            memcpy(&scale, p, sizeof scale);
            return set1(scale);
        } else {
            const Vec scale = set1(row.scales[group]);
            return kCodes == kInt8 ? mul(scale, set1(row.packing->scale_factor)) : scale;
        }
    }
    PEFTK_INLINE void decode_bytes(const uint8_t* p, Vec scale, Vec* to) {
#pragma GCC unroll 8
        for (int r = 0; r < kRegisters; r++) to[r] = mul(load(reinterpret_cast<const int8_t*>(p) + r * W), scale);
    }
    PEFTK_INLINE void decode_halves(const uint8_t* p, const Linear4& values, Vec* to) {
#pragma GCC unroll 8
        for (int r = 0; r < kRegisters / 2; r++) {
            const Codes4 codes = load_codes(p + r * W);
            to[r] = values.low(codes);
            to[r + kRegisters / 2] = values.high(codes);
        }
    }
    PEFTK_INLINE void decode(const Row& row, int64_t k, Vec* to) {
        const uint8_t* p = at(row, k);
        const int64_t group = kHasBlocks ? 0 : k >> row.packing->group_shift;
        const Vec s = scale(row, p, group);
        if constexpr (kCodes == kInt8) {
            decode_bytes(p, s, to);
        } else if constexpr (kCodes == kBlocks8) {
            decode_bytes(p + 2, s, to);
        } else if constexpr (kCodes == kBlocks4) {
            decode_halves(p + 2, Linear4(s), to);
        } else if constexpr (kCodes == kHalves) {
            decode_halves(p, row.zeros ? Linear4(set1(float(row.zeros[group])), s) : Linear4(s), to);
        } else {
            const Lookup4 values(row.packing->table, s);
#pragma GCC unroll 4
            for (int r = 0; r < kRegisters / 2; r++) {
                const Codes4 codes = load_codes(p + r * W);
                to[2 * r] = values.high(codes);
                to[2 * r + 1] = values.low(codes);
            }
        }
    }
    // The first n < 32 elements of a row of kInt8, whose end need not be a whole step's; then zeros.
    PEFTK_INLINE void decode_n(const Row& row, int64_t k, int64_t n, Vec* to) {
        uint8_t bytes[kPackedStep] = {};
        memcpy(bytes, at(row, k), size_t(n));
        decode_bytes(bytes, scale(row, nullptr, k >> row.packing->group_shift), to);
    }
};

// In the order in which they lie in the row: elements first … first + n - 1. Writes whole registers, with zeros after
// the last element.
template <int kCodes, class S>
static void decode_row(const PackedRow<kCodes, S>& row, int64_t first, int64_t n, float* to) {
    typedef PackedStep<kCodes, S> Step;
    const auto step = [&](int64_t k, int64_t left, float* out) {
        Vec values[Step::kRegisters];
        if (kCodes == kInt8 && left < kPackedStep) {
            if constexpr (kCodes == kInt8) Step::decode_n(row, k, left, values);
        } else {
            Step::decode(row, k, values);
        }
        if constexpr (kCodes == kPairs) {
#pragma GCC unroll 4
            for (int r = 0; r < Step::kRegisters; r += 2) zip(values[r], values[r + 1], values + r);
        }
#pragma GCC unroll 8
        for (int r = 0; r < Step::kRegisters; r++) store(out + r * W, values[r]);
    };
    const int64_t end = first + n;
    float* out = to;
    for (int64_t k = first / kPackedStep * kPackedStep; k < end; k += kPackedStep) {
        if (k >= first && k + kPackedStep <= end) {
            step(k, kPackedStep, out);
            out += kPackedStep;
            continue;
        }
        float values[kPackedStep];
        const int64_t from = max64(first - k, 0), count = min64(end - k, kPackedStep) - from;
        step(k, end - k, values);
        memcpy(out, values + from, size_t(count) * sizeof(float));
        out += count;
    }
    for (const float* last = to + round_up(n, W); out < last; out++) *out = 0;
}

// Calls f with row number `row` of the op's packed W.
template <class F>
static void with_packed_row(const LinearOp& op, int64_t row, F f) {
    const Packing& p = op.packing;
    const auto* codes = static_cast<const uint8_t*>(op.weight);
    const auto with = [&](auto kCodes, auto scale) {
        typedef decltype(scale) S;
        const PackedRow<decltype(kCodes)::value, S> first{codes, static_cast<const S*>(p.scales), p.zeros, &p};
        f(first + row);
    };
    const auto with_scales = [&](auto kCodes) {
        if (p.scale_dtype == kFloat16) return with(kCodes, f16{});
        if (p.scale_dtype == kBFloat16) return with(kCodes, bf16{});
        with(kCodes, float{});
    };
    switch (p.codes) {
        case kInt8: return with_scales(std::integral_constant<int, kInt8>{});
        case kHalves: return with_scales(std::integral_constant<int, kHalves>{});
        case kPairs: return with(std::integral_constant<int, kPairs>{}, float{});
        case kBlocks8: return with(std::integral_constant<int, kBlocks8>{}, f16{});
        default: return with(std::integral_constant<int, kBlocks4>{}, f16{});
    }
}

// Elements first … first + n - 1 of row number `row` of W, in fp32. Writes whole registers.
[[maybe_unused]] static void read_weight(const LinearOp& op, int64_t row, int64_t first, int64_t n, float* to) {
    if (op.packed()) return with_packed_row(op, row, [&](const auto& packed) { decode_row(packed, first, n, to); });
    widen(at(op.weight, op.weight_dtype, row * op.row_elements() + first), op.weight_dtype, n, to);
}

// Whether the dot form reads the input in blocks of even and odd elements.
static inline bool reads_even_odd(const LinearOp& op) {
    return op.packed() ? op.packing.codes == kPairs : op.weight_dtype == kBFloat16;
}

// dot of `count` rows of a packed W, from number `row` on, with prepared rows of the input
// (cpu/kernels/packed_dot.cpp).
void packed_dot(const LinearOp& op, int64_t tokens, const void* const* x, int64_t row, int64_t count, float* out,
                int64_t out_row);

}  // namespace PEFTK_LEVEL
}  // namespace peftk
