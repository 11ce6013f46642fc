// Dtype codes as Python passes them to peftk._cpu and peftk._cuda.
#pragma once

#include <stdexcept>
#include <string>

#include "common/dtype.h"

namespace peftk {

inline Dtype dtype_of(const char* name, int code) {
    if (code < kFloat32 || code > kFloat16) {
        throw std::invalid_argument(std::string(name) + ": expected a dtype code 0, 1 or 2, got " +
                                    std::to_string(code));
    }
    return Dtype(code);
}

}  // namespace peftk
