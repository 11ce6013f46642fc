// The one-byte code that makes unmerge exact, shared by all devices.
#pragma once

#include <cstdint>

#include "common/host_device.h"

namespace peftk {

// The code is the distance from W″ = round(fl(W' - d)) to W, counted in representable values in sign-magnitude order.
// `Uints` is the type `Lane` or a vector of it. The bits of a 16-bit weight in 32-bit lanes are sign-extended, with
// kMagnitude = 0x7fff. A distance may wrap around where W and W″ are large and of opposite sign, but not into the range
// that has codes, since W and W″ of a finite merge differ by at most a rounding of W'.
namespace merge_code {

constexpr int kRaw = 127;        // the distance does not fit: the caller stores W's bits separately
constexpr int kZero = -128;      // W was +0
constexpr int kFarthest = -127;  // distances from here to kRaw - 1 have codes

// A receipt stores a code in half a byte: codes from kHalfFarthest to kHalfFar - 1 unchanged, and +0 as kHalfZero. For
// any other code it stores kHalfFar, and the code itself as a byte in a separate list, in the order of the elements.
constexpr int kHalfFar = 7;
constexpr int kHalfZero = -8;
constexpr int kHalfFarthest = -7;

// The position of a value in sign-magnitude order: +0 is 0, -0 is -1, and so on outwards. Its own inverse.
template <typename Lane, Lane kMagnitude, typename Uints>
PEFTK_HOST_DEVICE inline Uints order(Uints bits) {
    return bits ^ (-(bits >> (8 * sizeof(Lane) - 1)) & kMagnitude);
}

// The code; its low byte is stored.
template <typename Lane, Lane kMagnitude, typename Uints>
PEFTK_HOST_DEVICE inline Uints encode(Uints weight_bits, Uints back_bits) {
    const Uints place = order<Lane, kMagnitude>(weight_bits);
    const Uints distance = place - order<Lane, kMagnitude>(back_bits);
    const Uints code = distance - Lane(kFarthest) < Lane(kRaw - kFarthest) ? distance : Uints{} + Lane(kRaw);
    return place == Lane(0) ? Uints{} + Lane(kZero) : code;
}

// W's bits from those of W″ and the sign-extended code. A raw weight is returned as W″.
template <typename Lane, Lane kMagnitude, typename Uints>
PEFTK_HOST_DEVICE inline Uints decode(Uints back_bits, Uints code) {
    const Uints distance = code == Lane(kRaw) ? Uints{} : code;
    const Uints place = order<Lane, kMagnitude>(back_bits) + distance;
    return order<Lane, kMagnitude>(code == Lane(kZero) ? Uints{} : place);
}

}  // namespace merge_code
}  // namespace peftk
