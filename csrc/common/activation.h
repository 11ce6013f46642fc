// An adapter's activation functions and their derivatives. Codes and formulas as in peftk/adapters/activations.py.
#pragma once

#include <math.h>

#include "common/host_device.h"

namespace peftk {

enum Activation : int { kIdentity = 0, kRelu = 1, kGelu = 2, kGeluTanh = 3, kSilu = 4 };

static inline PEFTK_HOST_DEVICE float activate(int code, float z) {
    switch (code) {
        case kRelu: return z < 0.0f ? 0.0f : z;                          // NaN stays NaN
        case kGelu: return 0.5f * z * erfcf(z * -0.70710678118654752f);  // erfc: no cancellation in the left tail
        case kGeluTanh: {
            // (1 + tanh t) / 2 = 1 / (1 + e^-2t), again without cancellation
            const float t = 0.79788456080286536f * (z + 0.044715f * z * z * z);
            return z / (1.0f + expf(-2.0f * t));
        }
        case kSilu: return z / (1.0f + expf(-z));
        default: return z;
    }
}

static inline PEFTK_HOST_DEVICE float activate_derivative(int code, float z) {
    switch (code) {
        case kRelu: return z > 0.0f ? 1.0f : 0.0f;
        case kGelu: {
            const float cdf = 0.5f * erfcf(z * -0.70710678118654752f);
            return cdf + z * expf(-0.5f * z * z) * 0.39894228040143268f;
        }
        case kGeluTanh: {
            const float c = 0.79788456080286536f, d = 0.044715f;
            const float t = tanhf(c * (z + d * z * z * z));
            return 0.5f * (1.0f + t) + 0.5f * z * (1.0f - t * t) * c * (1.0f + 3.0f * d * z * z);
        }
        case kSilu: {
            const float s = 1.0f / (1.0f + expf(-z));
            return s * (1.0f + z * (1.0f - s));
        }
        default: return 1.0f;
    }
}

}  // namespace peftk
