// The fused linear layer of peftk._cpu, forward and backward.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "bindings/adapters.h"
#include "bindings/gil.h"
#include "bindings/named.h"
#include "cpu/lora_linear.h"

namespace peftk {

static inline Dropout dropout_of(double p, uint64_t seed) {
    return {p > 0, uint32_t(p * 0x1p32), float(1 / (1 - p)), seed};
}

template <>
constexpr bool kHasClass<Packing> = true;

static inline void define_packing(pybind11::module_& module) {
    const auto packing = define_class<Packing>(module, "Packing", "How the elements of a packed W are stored.");
    define(packing, "of",
           "(codes, *, row_bytes, groups=0, group_shift=0, scales=0, scale_dtype=0, scale_factor, zeros=0, table=0)",
           "codes: int8, halves, pairs, blocks8 or blocks4; scales and zeros [N, groups], table [16]: addresses.",
           [](int codes, int64_t row_bytes, int64_t groups, int group_shift, uintptr_t scales, int scale_dtype,
              double scale_factor, uintptr_t zeros, uintptr_t table) {
               if (codes <= kPlain || codes > kBlocks4) {
                   throw std::invalid_argument("codes: expected 1 to 5, got " + std::to_string(codes));
               }
               Packing packing;
               packing.codes = codes, packing.row_bytes = row_bytes;
               packing.groups = groups, packing.group_shift = group_shift;
               packing.scales = address<void>(scales), packing.scale_dtype = dtype_of("scale_dtype", scale_dtype);
               packing.scale_factor = float(scale_factor);
               packing.zeros = address<uint8_t>(zeros), packing.table = address<float>(table);
               return packing;
           });
}

template <>
constexpr bool kHasClass<Linear> = true;

static inline void define_linear(pybind11::module_& module) {
    const auto linear =
        define_class<Linear>(module, "Linear", "The arguments that forward and backward share: x and the base layer.");
    define(linear, "of",
           "(*, M, N, K, x, x_stride, x_dtype, weight, weight_n, weight_k, weight_dtype, packing=None, bias=0, "
           "bias_dtype=0, dropout_p=0.0, seed=0, batch_invariant=False, threads)",
           "x [M, K], weight [N, K] with its strides along N and K, or packed, bias [N].",
           [](int64_t M, int64_t N, int64_t K, uintptr_t x, int64_t x_stride, int x_dtype, uintptr_t weight,
              int64_t weight_n, int64_t weight_k, int weight_dtype, const Packing* packing, uintptr_t bias,
              int bias_dtype, double dropout_p, uint64_t seed, bool batch_invariant, int threads) {
               Linear linear{};
               linear.M = M, linear.N = N, linear.K = K;
               linear.x = address<void>(x), linear.x_stride = x_stride, linear.x_dtype = dtype_of("x_dtype", x_dtype);
               linear.weight = address<void>(weight), linear.weight_n = weight_n, linear.weight_k = weight_k;
               linear.weight_dtype = dtype_of("weight_dtype", weight_dtype);
               if (packing) linear.packing = *packing;
               linear.bias = address<void>(bias), linear.bias_dtype = dtype_of("bias_dtype", bias_dtype);
               linear.dropout = dropout_of(dropout_p, seed);
               linear.batch_invariant = batch_invariant;
               linear.threads = threads;
               return linear;
           });
    define(linear, "over_base", "(*, M, N, K, x, x_stride, x_dtype, dropout_p=0.0, seed=0, threads)",
           "For a y or dx that already holds the base layer's part: the adapters' part is added in place.",
           [](int64_t M, int64_t N, int64_t K, uintptr_t x, int64_t x_stride, int x_dtype, double dropout_p,
              uint64_t seed, int threads) {
               Linear linear{};
               linear.M = M, linear.N = N, linear.K = K;
               linear.over_base = true;
               linear.x = address<void>(x), linear.x_stride = x_stride, linear.x_dtype = dtype_of("x_dtype", x_dtype);
               linear.dropout = dropout_of(dropout_p, seed);
               linear.threads = threads;
               return linear;
           });
}

static inline LinearArgs linear_args(const Linear& linear, const Adapters& adapters, uintptr_t ids, uintptr_t z,
                                     int64_t z_stride) {
    LinearArgs args{};
    static_cast<Linear&>(args) = linear;
    args.adapters = adapters, args.ids = address<int32_t>(ids);
    args.z = address<float>(z), args.z_stride = z_stride;
    return args;
}

static inline void bind_lora_linear(pybind11::module_& module) {
    define_packing(module);
    define_linear(module);
    define(module, "plan", "(linear, *, backward)",
           "(form of the product, whether it uses pairs of bf16, number of threads)",
           [](const Linear& linear, bool backward) {
               Plan plan{};
               PEFTK_CALL(level_in_use(), lora_linear_plan, (linear, backward, &plan));
               return std::tuple(plan.form, plan.pairs, plan.threads);
           });
    define(
        module, "lora_linear", "(linear, adapters, *, ids=0, y, y_stride, z=0, z_stride=0)",
        "Writes y [M, N], and z [M, z_stride] unless its address is 0. Without ids every row uses the first adapter.",
        [](const Linear& linear, const Adapters& adapters, uintptr_t ids, uintptr_t y, int64_t y_stride, uintptr_t z,
           int64_t z_stride) {
            LinearArgs args = linear_args(linear, adapters, ids, z, z_stride);
            args.y = address<void>(y), args.y_stride = y_stride;
            const Level level = level_in_use();
            without_gil(work_of(args, !args.over_base), [&] {
                const Order order = order_by_adapter(args.ids, args.M, args.adapters);
                PEFTK_CALL(level, lora_linear, (args, order));
            });
        });
    define(module, "lora_linear_backward",
           "(linear, adapters, *, ids=0, dy, dy_stride, dy_dtype, dx=0, dx_stride=0, z=0, z_stride=0, grads)",
           "Writes dx [M, K] and the gradients. grads: per adapter the addresses of dA, dB, da, dbeta; 0: not wanted.",
           [](const Linear& linear, const Adapters& adapters, uintptr_t ids, uintptr_t dy, int64_t dy_stride,
              int dy_dtype, uintptr_t dx, int64_t dx_stride, uintptr_t z, int64_t z_stride,
              const std::vector<std::array<int64_t, 4>>& grads) {
               if (grads.size() != size_t(adapters.count)) {
                   throw std::invalid_argument("grads: expected one entry for each of " +
                                               std::to_string(adapters.count) + " adapters, got " +
                                               std::to_string(grads.size()));
               }
               LinearBackwardArgs args{};
               args.forward = linear_args(linear, adapters, ids, z, z_stride);
               args.dy = address<void>(dy), args.dy_stride = dy_stride, args.dy_dtype = dtype_of("dy_dtype", dy_dtype);
               args.dx = address<void>(dx), args.dx_stride = dx_stride;
               args.grads = grads.empty() ? nullptr : grads.front().data();
               const Level level = level_in_use();
               without_gil(work_of(args.forward, args.dx && !linear.over_base), [&] {
                   const Order order = order_by_adapter(args.forward.ids, linear.M, adapters);
                   PEFTK_CALL(level, lora_linear_backward, (args, order));
               });
           });
}

}  // namespace peftk
