// When a call lets other Python threads run.
#pragma once

#include <pybind11/pybind11.h>

namespace peftk {

// From here on, releasing the GIL (two atomic operations and perhaps a wait to have it back) costs nothing measurable.
constexpr double kReleaseWork = 1 << 18;

template <class Body>
static inline void without_gil(double work, Body body) {
    if (work < kReleaseWork) return body();
    const pybind11::gil_scoped_release release;
    body();
}

}  // namespace peftk
