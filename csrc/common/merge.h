// What merge and unmerge share on every device: the one-byte code that makes them exact.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace peftk {

// The code: from W″ = round(fl(W' - d)) to W, counted in representable values in sign-magnitude order. `Uints` are
// lanes of the type `Lane`, or one; the bits of a 16-bit weight in lanes of 32 come sign-extended, with kMagnitude =
// 0x7fff. A distance may wrap around, where W and W″ are large and of opposite sign: never into the range that has
// codes, since W and W″ of a finite merge are within a rounding of W' of each other.
namespace merge_code {

constexpr int kRaw = 127;        // the distance does not fit: the caller keeps W's bits aside
constexpr int kZero = -128;      // W was +0
constexpr int kFarthest = -127;  // distances from here to kRaw - 1 have codes

// What a receipt holds of it is the same once more at half the size: codes from kHalfFarthest to kHalfFar - 1 as they
// are, +0 as kHalfZero, and kHalfFar for any other, which follows apart, as a byte, in order of place.
constexpr int kHalfFar = 7;
constexpr int kHalfZero = -8;
constexpr int kHalfFarthest = -7;

// Bits to their place in the order: +0 is 0, -0 is -1, and so on outwards. It is its own inverse.
template <typename Lane, Lane kMagnitude, typename Uints>
PEFTK_HOST_DEVICE inline Uints order(Uints bits) {
    return bits ^ (-(bits >> (8 * sizeof(Lane) - 1)) & kMagnitude);
}

// The code's low byte is what is stored.
template <typename Lane, Lane kMagnitude, typename Uints>
PEFTK_HOST_DEVICE inline Uints encode(Uints weight_bits, Uints back_bits) {
    const Uints place = order<Lane, kMagnitude>(weight_bits);
    const Uints distance = place - order<Lane, kMagnitude>(back_bits);
    const Uints code = distance - Lane(kFarthest) < Lane(kRaw - kFarthest) ? distance : Uints{} + Lane(kRaw);
    return place == Lane(0) ? Uints{} + Lane(kZero) : code;
}

// `code` comes sign-extended. A raw weight comes back as W″.
template <typename Lane, Lane kMagnitude, typename Uints>
PEFTK_HOST_DEVICE inline Uints decode(Uints back_bits, Uints code) {
    const Uints distance = code == Lane(kRaw) ? Uints{} : code;
    const Uints place = order<Lane, kMagnitude>(back_bits) + distance;
    return order<Lane, kMagnitude>(code == Lane(kZero) ? Uints{} : place);
}

}  // namespace merge_code
}  // namespace peftk
