// mma.sync.m16n8k16 for 16-bit inputs and an fp32 sum, from the fragments' layout in the PTX manual.
//
// The arithmetic is that of the A100 as measured by Fasi, Higham, Mikaitis and Pranesh, "Numerical behavior of NVIDIA
// tensor cores", PeerJ Computer Science 7 (2021): products are exact; the sum and eight products at a time are aligned
// to the largest of them, truncated to one bit more than fp32 has, and added exactly; the result is truncated to fp32.
// Other GPUs differ in the number of products and of extra bits. Nothing rounds to nearest.
#include <cmath>
#include <cstring>

#include "executor.h"

namespace cuda_on_host {
namespace {

struct Fragments {
    const uint32_t* a;
    const uint32_t* b;
    float* sum;
};

double widen(unsigned bits, bool bfloat16) {
    bits &= 0xffff;
    if (bfloat16) {
        const uint32_t word = bits << 16;
        float value;
        memcpy(&value, &word, sizeof value);
        return value;
    }
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const double magnitude = exponent == 31  ? (fraction ? NAN : INFINITY)
                             : exponent == 0 ? std::ldexp(fraction, -24)
                                             : std::ldexp(1024 + fraction, exponent - 25);
    return bits >> 15 ? -magnitude : magnitude;
}

// 2^exponent and its inverse, for normal doubles. All are normal here: the smallest product of two bfloat16 is 2^-266.
double power_of_two(int exponent) {
    const uint64_t bits = uint64_t(1023 + exponent) << 52;
    double value;
    memcpy(&value, &bits, sizeof value);
    return value;
}
int exponent_of(double positive) {
    uint64_t bits;
    memcpy(&bits, &positive, sizeof bits);
    return int(bits >> 52) - 1023;
}

float towards_zero(double value) {
    const float nearest = float(value);
    if (std::isinf(nearest) || std::fabs(double(nearest)) <= std::fabs(value)) return nearest;
    return std::nextafter(nearest, 0.0f);
}

// An unrounded sum in units of the last bit that is kept. Nine terms of 25 bits easily fit into an int64.
float add_eight(float sum, const double (&products)[8]) {
    double largest = std::fabs(sum);
    bool finite = std::isfinite(sum);
    for (const double product : products) {
        const double size = std::fabs(product);
        largest = largest < size ? size : largest;
        finite = finite && std::isfinite(product);
    }
    if (!finite || largest == 0.0) {  // of zeros, only -0 and -0 make -0
        double total = sum;
        for (const double product : products) total += product;
        return float(total);
    }
    const int last = exponent_of(largest) - 24;
    const double units = power_of_two(-last);
    int64_t total = int64_t(sum * units);
    for (const double product : products) total += int64_t(product * units);
    return towards_zero(double(total) * power_of_two(last));
}

template <bool kBFloat16>
void perform(void* const (&records)[32], unsigned) {
    const auto of = [&](int g, int t) -> const Fragments& { return *static_cast<Fragments*>(records[4 * g + t]); };
    double a[16][16], b[16][8];
    for (int g = 0; g < 8; ++g) {
        for (int t = 0; t < 4; ++t) {
            for (int half = 0; half < 2; ++half) {
                const int shift = 16 * half;
                for (int i = 0; i < 4; ++i)
                    a[g + 8 * (i % 2)][2 * t + half + 8 * (i / 2)] = widen(of(g, t).a[i] >> shift, kBFloat16);
                for (int i = 0; i < 2; ++i) b[2 * t + half + 8 * i][g] = widen(of(g, t).b[i] >> shift, kBFloat16);
            }
        }
    }
    for (int row = 0; row < 16; ++row) {
        for (int column = 0; column < 8; ++column) {
            float& sum = of(row % 8, column / 2).sum[column % 2 + 2 * (row / 8)];
            for (int step = 0; step < 16; step += 8) {
                double products[8];
                for (int k = 0; k < 8; ++k) products[k] = a[row][step + k] * b[step + k][column];
                sum = add_eight(sum, products);
            }
        }
    }
    ++statistics.products;
}

}  // namespace

void multiply(Site site, float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bool bfloat16) {
    Fragments record{a, b, sum};
    meet(bfloat16 ? "multiply_bf16" : "multiply_f16", site, ~0u, &record, bfloat16 ? perform<true> : perform<false>);
}

}  // namespace cuda_on_host
