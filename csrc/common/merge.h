// What merge and unmerge share on every device: their arguments, and the one-byte code that makes them exact.
#pragma once

#include <cstdint>

#include "common/dtype.h"

#ifdef __CUDACC__
#define PEFTK_HOST_DEVICE __host__ __device__
#else
#define PEFTK_HOST_DEVICE
#endif

namespace peftk {

// d = fl(scaling * t), t the chain of fma over ascending ranks. Merge writes W' = round(fl(W + d)) and the code;
// unmerge reads W' and the code and writes W. Strides are in elements; `out` may be `weight` itself.
struct MergeArgs {
    const void* weight;  // [N, K], contiguous rows: W, or W' to unmerge
    int64_t weight_stride;
    void* out;  // [N, K], contiguous rows
    int64_t out_stride;
    const void* lora_A;  // [R, K], dense
    const void* lora_B;  // [N, R], dense
    int8_t* code;        // [N, K], dense: written by merge, read by unmerge
    int64_t N, K, R;
    float scaling;
    Dtype weight_dtype;
    Dtype adapter_dtype;
};

// The code: from W″ = round(fl(W' - d)) to W, counted in representable values in sign-magnitude order. `Uint` is a
// lane, uint32_t, or a SIMD vector of them; unsigned, because NaNs may make a distance wrap. The bits of a 16-bit
// weight come sign-extended to the lane, with kMagnitude = 0x7fff; those of a 32-bit weight with kMagnitude =
// 0x7fffffff.
namespace merge_code {

constexpr uint32_t kRaw = 127;                  // the distance does not fit: the caller keeps W's bits aside
constexpr uint32_t kZero = uint32_t(-128);      // W was +0
constexpr uint32_t kFarthest = uint32_t(-127);  // distances from here to kRaw - 1 have codes

// Bits to their place in the order: +0 is 0, -0 is -1, and so on outwards. It is its own inverse.
template <uint32_t kMagnitude, typename Uint>
PEFTK_HOST_DEVICE inline Uint order(Uint bits) {
    return bits ^ (-(bits >> 31) & kMagnitude);
}

// The code's low byte is what is stored.
template <uint32_t kMagnitude, typename Uint>
PEFTK_HOST_DEVICE inline Uint encode(Uint weight_bits, Uint back_bits) {
    const Uint place = order<kMagnitude>(weight_bits);
    const Uint distance = place - order<kMagnitude>(back_bits);
    const Uint code = distance - kFarthest < kRaw - kFarthest ? distance : Uint{} + kRaw;
    return place == 0 ? Uint{} + kZero : code;
}

// `code` comes sign-extended. A raw weight comes back as W″.
template <uint32_t kMagnitude, typename Uint>
PEFTK_HOST_DEVICE inline Uint decode(Uint back_bits, Uint code) {
    const Uint distance = code == kRaw ? Uint{} : code;
    const Uint place = order<kMagnitude>(back_bits) + distance;
    return order<kMagnitude>(code == kZero ? Uint{} : place);
}

}  // namespace merge_code
}  // namespace peftk
