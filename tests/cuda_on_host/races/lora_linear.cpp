// lora_linear.cu for the race detector: `lora_linear SEEDS` runs one case in so many schedules. It is cut along K in
// both halves, so that blocks wait for one another in every way that the kernel has. Results are held to a plain sum,
// coarsely: tests/on_host/lora_linear.py is about values.
#include "cuda/lora_linear.h"

#include <cuda_bf16.h>

#include <memory>
#include <vector>

namespace {

constexpr int M = 3, N = 128, K = 512, R = 10, kPages = 1, kProcessors = 8;

struct alignas(16) Eight {
    __nv_bfloat16 values[8];
};

// Small values whose sums stay near 1, at a multiple of 16 bytes.
struct Matrix {
    int columns;
    std::vector<Eight> eights;
    Matrix(int rows, int columns, float scale, int seed) : columns(columns), eights(size_t(rows * columns + 7) / 8) {
        for (int i = 0; i < rows * columns; ++i)
            data()[i] = __float2bfloat16_rn(scale * float((i * 7919 + seed) % 17 - 8) / 8.0f);
    }
    __nv_bfloat16* data() { return eights[0].values; }
    float operator()(int row, int column) { return __bfloat162float(data()[row * columns + column]); }
};

bool run() {
    using namespace peftk::cuda;
    Matrix x(M, K, 1.0f, 1), weight(N, K, 0.05f, 2), A(R, K, 0.05f, 3), B(N, R, 0.3f, 4), y(M, N, 0.0f, 0);
    const LoraLinearPlan plan = plan_lora_linear(M, N, K, kPages, kProcessors);
    if (plan.shrink_splits < 2 || plan.expand_splits < 2) cuda_on_host::fail("the case is not cut along K");
    std::vector<float> z(M * 16 * kPages), partials(size_t(plan.partials));
    std::vector<int32_t> counters(size_t(plan.counters));

    LoraLinearArgs args = {};
    args.x = x.data(), args.x_stride = K;
    args.weight = weight.data(), args.weight_stride = K;
    args.y = y.data(), args.z = z.data();
    args.M = M, args.N = N, args.K = K;
    args.dtype = args.adapters.dtype = args.bias_dtype = peftk::Dtype::kBFloat16;
    args.adapters.count = 1, args.adapters.slice_count = 1, args.adapters.z_pages = kPages;
    args.adapters.one = {
        reinterpret_cast<int64_t>(A.data()), K, reinterpret_cast<int64_t>(B.data()), R, 1, 0, 0, R, 0, 2.0f};
    args.z_dense = true;
    args.partials = partials.data(), args.counters = counters.data();
    const Status status = lora_linear(args, plan, 0, nullptr);
    if (!status.ok()) cuda_on_host::fail("lora_linear: %s", describe(status.unsupported));

    for (int m = 0; m < M; ++m) {
        for (int n = 0; n < N; ++n) {
            double sum = 0;
            for (int k = 0; k < K; ++k) sum += double(x(m, k)) * weight(n, k);
            for (int r = 0; r < R; ++r) {
                double z = 0;
                for (int k = 0; k < K; ++k) z += double(x(m, k)) * A(r, k);
                sum += 2.0 * z * B(n, r);
            }
            if (!(std::fabs(y(m, n) - sum) <= 0.01 * std::fabs(sum) + 0.01)) return false;
        }
    }
    for (const int32_t counter : counters)
        if (counter) return false;
    return true;
}

}  // namespace

int main(int count, char** arguments) {
    if (count != 2) return 2;
    for (int seed = 0; seed < atoi(arguments[1]); ++seed) {
        cuda_on_host::cuda_on_host_seed(uint64_t(seed));
        if (run()) continue;
        printf("wrong with seed %d\n", seed);
        return 1;
    }
    return 0;
}
