// A linear layer with its adapters in one launch, for up to 64 rows: a decode step (docs/decode.md).
//
// Blocks draw tickets (cuda/tickets.cuh). The first tickets are shrink tiles, which compute z (cuda/shrink.cuh). Later
// ones are expand tiles (cuda/expand.cuh), which multiply by W on the tensor cores and only then wait for z.

#include "cuda/lora_linear.h"

#include <algorithm>
#include <type_traits>

#include "cuda/expand.cuh"
#include "cuda/shrink.cuh"

namespace peftk::cuda {
namespace {

static_assert(shrink::kThreads == expand::kThreads, "a block runs either a shrink or an expand tile");

template <int kTiles>
struct Shared {
    Rows<8 * kTiles> rows;
    int broadcast;
    union {
        shrink::Shared shrink;
        expand::Shared<kTiles> expand;
    };
};

template <typename T, typename A, int kTiles>
__global__ void __launch_bounds__(expand::kThreads, 3) lora_linear_kernel(LoraLinearArgs args, LoraLinearPlan plan) {
    auto& shared = shared_memory<Shared<kTiles>>();
    const int ticket = tickets::draw(args.counters, shared.broadcast);
    if (ticket < plan.shrink_tiles) {
        sort_rows(args, shared.rows);
        shrink::tile<T, A>(args, plan, ticket, shared.rows, shared.shrink, shared.broadcast);
    } else {
        expand::tile<T, A>(args, plan, ticket - plan.shrink_tiles, shared.rows, shared.expand, shared.broadcast);
    }
    tickets::leave(args.counters);
}

// Calls `body` with the number of tensor-core products, 8 rows wide each, that M rows need, as a constant.
template <typename Body>
auto with_tiles(int M, Body body) {
    if (M <= 8) return body(std::integral_constant<int, 1>{});
    if (M <= 16) return body(std::integral_constant<int, 2>{});
    if (M <= 32) return body(std::integral_constant<int, 4>{});
    return body(std::integral_constant<int, 8>{});
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename T, typename A, int kTiles>
Status launch(const LoraLinearArgs& args, const LoraLinearPlan& plan, cudaStream_t stream) {
    const auto kernel = lora_linear_kernel<T, A, kTiles>;
    constexpr size_t kBytes = sizeof(Shared<kTiles>);
    if (kBytes > 48 * 1024) {
        const auto status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(kBytes));
        if (status != cudaSuccess) return status;
    }
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(unsigned(plan.shrink_tiles + plan.expand_tiles));
    config.blockDim = dim3(expand::kThreads);
    config.dynamicSmemBytes = kBytes;
    config.stream = stream;
    return cudaLaunchKernelEx(&config, kernel, args, plan);
}

template <typename T, typename A>
Status for_rows(const LoraLinearArgs& args, const LoraLinearPlan& plan, cudaStream_t stream) {
    return with_tiles(args.M, [&](auto tiles) { return launch<T, A, decltype(tiles)::value>(args, plan, stream); });
}

template <typename T>
Status for_adapters(const LoraLinearArgs& args, const LoraLinearPlan& plan, cudaStream_t stream) {
    if (args.adapters.dtype == args.dtype) return for_rows<T, T>(args, plan, stream);
    if (args.adapters.dtype == Dtype::kFloat32) return for_rows<T, float>(args, plan, stream);
    return Unsupported::kDtype;
}

}  // namespace

LoraLinearPlan plan_lora_linear(int M, int N, int K, int z_pages, int processors) {
    LoraLinearPlan plan = {};
    const int rows = 8 * with_tiles(M, [](auto tiles) { return int(tiles); });
    // Shrink: one tile per processor, of at least one step. The block that sums the splits reads at most 32 parts.
    const int z_tiles = int(divide_up(M, shrink::kRows)) * z_pages;
    const int shrink_steps = int(divide_up(K, shrink::kStep));
    plan.shrink_splits = std::clamp(processors / std::max(z_tiles, 1), 1, std::min(shrink_steps, 32));
    plan.shrink_splits = int(divide_up(shrink_steps, divide_up(shrink_steps, plan.shrink_splits)));
    plan.z_tiles = z_tiles;
    plan.shrink_tiles = z_tiles * plan.shrink_splits;
    // Expand: two blocks per processor, of at least four steps, while the parts are at most a sixteenth of W's bytes.
    const int y_tiles = int(divide_up(N, expand::kColumns)), steps = int(divide_up(K, expand::kStep));
    const int most = std::clamp(std::min(K / (32 * rows), steps / 4), 1, 8);
    plan.expand_splits = std::clamp(2 * processors / std::max(y_tiles, 1), 1, most);
    plan.expand_splits = int(divide_up(steps, divide_up(steps, plan.expand_splits)));  // none of them empty
    plan.expand_tiles = y_tiles * plan.expand_splits;

    plan.expand_parts = plan.shrink_splits > 1 ? int64_t(plan.shrink_tiles) * shrink::kThreads : 0;
    plan.partials = plan.expand_parts;
    if (plan.expand_splits > 1) plan.partials += int64_t(plan.expand_tiles) * rows * expand::kColumns;
    plan.counters = tickets::kArrivals + z_tiles + y_tiles;
    plan.shared = with_tiles(M, [](auto tiles) { return int(sizeof(Shared<decltype(tiles)::value>)); });
    return plan;
}

Status lora_linear(const LoraLinearArgs& args, const LoraLinearPlan& plan, int device, cudaStream_t stream) {
    if (args.M < 1 || args.M > kMostRows) return Unsupported::kM;
    if (args.K < 8 || args.K % 8) return Unsupported::kK;
    if (!starts_on_16(args.x, args.x_stride) || !starts_on_16(args.weight, args.weight_stride))
        return Unsupported::kAlignment;
    if (args.N == 0) return cudaSuccess;
    const DeviceGuard guard(device);
    if (guard.status() != cudaSuccess) return guard.status();
    switch (args.dtype) {
        case Dtype::kBFloat16: return for_adapters<__nv_bfloat16>(args, plan, stream);
        case Dtype::kFloat16: return for_adapters<__half>(args, plan, stream);
        default: return Unsupported::kDtype;
    }
}

}  // namespace peftk::cuda
