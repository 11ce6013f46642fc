// Releases the GIL during calls that are long enough.
#pragma once

#include <pybind11/pybind11.h>

namespace peftk {

// From this many multiply-adds on, the cost of releasing the GIL (two atomic operations, and perhaps a wait to get it
// back) cannot be measured.
constexpr double kReleaseWork = 1 << 18;

template <class Body>
static inline void without_gil(double work, Body body) {
    if (work < kReleaseWork) return body();
    const pybind11::gil_scoped_release release;
    body();
}

}  // namespace peftk
