// The module peftk._cpu: addresses, sizes and codes in, nothing else. peftk/backends/cpu.py checks what it passes.
#include <pybind11/pybind11.h>

#include "bindings/adapters.h"
#include "bindings/cpu_merge.h"
#include "bindings/cpu_peak.h"
#include "bindings/direct_calls.h"
#include "bindings/gil.h"
#include "common/dtype.h"
#include "cpu/lora_linear.h"
#include "cpu/scratch.h"
#include "cpu/thread_pool.h"

namespace py = pybind11;

namespace peftk {

namespace {

// ---- SIMD levels --------------------------------------------------------------------------------------------------

py::list simd_levels() {
    py::list names;
    for (int level = 0; level < kLevels; level++) {
        if (level_runs_here(Level(level))) names.append(level_name(Level(level)));
    }
    return names;
}

void bind_levels(py::module_& m) {
    m.def("simd_levels", simd_levels, "The SIMD levels that this build and machine have, ascending.");
    m.def("simd_level", [] { return level_name(level_in_use()); }, "The SIMD level in use.");
    m.def("use_simd_level", use_level, "Chooses a SIMD level for the whole process.");
}

// ---- lora_linear --------------------------------------------------------------------------------------------------

// weight_dtype -1: y, or dx, holds the base layer's part already.
LinearArgs linear_args(int64_t M, int64_t N, int64_t K, uintptr_t x, int64_t x_stride, int x_dtype, uintptr_t weight,
                       int64_t weight_n, int64_t weight_k, int weight_dtype, double dropout_p, uint64_t seed,
                       int threads) {
    LinearArgs args{};
    args.M = M, args.N = N, args.K = K;
    args.over_base = weight_dtype < 0;
    args.x = address<void>(x), args.x_stride = x_stride, args.x_dtype = x_dtype;
    args.weight = address<void>(weight), args.weight_n = weight_n, args.weight_k = weight_k;
    args.weight_dtype = weight_dtype;
    args.dropout.on = dropout_p > 0;
    args.dropout.threshold = uint32_t(dropout_p * 0x1p32);
    args.dropout.scale = float(1 / (1 - dropout_p));
    args.dropout.seed = seed;
    args.threads = threads;
    return args;
}

void call_forward(LinearArgs& args, const Adapters& adapters, uintptr_t ids, uintptr_t bias, int bias_dtype,
                  uintptr_t y, int64_t y_stride, uintptr_t z, int64_t z_stride) {
    args.adapters = adapters, args.ids = address<int32_t>(ids);
    args.bias = address<void>(bias), args.bias_dtype = bias_dtype;
    args.y = address<void>(y), args.y_stride = y_stride;
    args.z = address<float>(z), args.z_stride = z_stride;
    const Level level = level_in_use();
    without_gil(work_of(args, !args.over_base), [&] {
        const Order order = order_by_adapter(args.ids, args.M, args.adapters);
        PEFTK_CALL(level, lora_linear, (args, order));
    });
}

void call_backward(const LinearArgs& forward, const Adapters& adapters, uintptr_t ids, uintptr_t dy, int64_t dy_stride,
                   int dy_dtype, uintptr_t dx, int64_t dx_stride, uintptr_t z, int64_t z_stride, const int64_t* grads) {
    LinearBackwardArgs args{};
    args.forward = forward;
    args.forward.adapters = adapters, args.forward.ids = address<int32_t>(ids);
    args.forward.z = address<float>(z), args.forward.z_stride = z_stride;
    args.dy = address<void>(dy), args.dy_stride = dy_stride, args.dy_dtype = dy_dtype;
    args.dx = address<void>(dx), args.dx_stride = dx_stride;
    args.grads = grads;
    const Level level = level_in_use();
    without_gil(work_of(args.forward, args.dx && !forward.over_base), [&] {
        const Order order = order_by_adapter(args.forward.ids, forward.M, adapters);
        PEFTK_CALL(level, lora_linear_backward, (args, order));
    });
}

void bind_lora_linear(py::module_& m) {
    m.def(
        "plan",
        [](int64_t M, int64_t N, int64_t K, int x_dtype, int64_t weight_n, int64_t weight_k, int weight_dtype,
           int threads, bool backward) {
            const LinearArgs args =
                linear_args(M, N, K, 0, K, x_dtype, 0, weight_n, weight_k, weight_dtype, 0, 0, threads);
            Plan plan{};
            PEFTK_CALL(level_in_use(), lora_linear_plan, (args, backward, &plan));
            return py::make_tuple(plan.form, plan.pairs, plan.threads);
        },
        "Form of the product, whether it takes pairs of bf16, threads.");
    // One adapter, given by its tensors; rank 0 without biases is the base layer alone.
    m.def(
        "lora_linear", [](int64_t M, int64_t N, int64_t K, uintptr_t x, int64_t x_stride, int x_dtype, uintptr_t weight,
                          int64_t weight_n, int64_t weight_k, int weight_dtype, double dropout_p, uint64_t seed,
                          int threads, uintptr_t A, int64_t A_stride, uintptr_t B, int64_t B_n, int64_t B_r, int rank,
                          int activation, float scaling, uintptr_t bias_A, uintptr_t bias_B, int dtype, uintptr_t bias,
                          int bias_dtype, uintptr_t y, int64_t y_stride, uintptr_t z, int64_t z_stride) {
            LinearArgs args = linear_args(M, N, K, x, x_stride, x_dtype, weight, weight_n, weight_k, weight_dtype,
                                          dropout_p, seed, threads);
            call_forward(args, table_of_one(A, A_stride, B, B_n, B_r, rank, activation, scaling, bias_A, bias_B, dtype),
                         0, bias, bias_dtype, y, y_stride, z, z_stride);
        });
    m.def("multi_lora_linear",
          [](int64_t M, int64_t N, int64_t K, uintptr_t x, int64_t x_stride, int x_dtype, uintptr_t weight,
             int64_t weight_n, int64_t weight_k, int weight_dtype, double dropout_p, uint64_t seed, int threads,
             uintptr_t pages, uintptr_t rows, uintptr_t scaling, uintptr_t biases, int count, int dtype, uintptr_t ids,
             uintptr_t bias, int bias_dtype, uintptr_t y, int64_t y_stride, uintptr_t z, int64_t z_stride) {
              LinearArgs args = linear_args(M, N, K, x, x_stride, x_dtype, weight, weight_n, weight_k, weight_dtype,
                                            dropout_p, seed, threads);
              call_forward(args, table_of(pages, rows, scaling, biases, count, dtype), ids, bias, bias_dtype, y,
                           y_stride, z, z_stride);
          });
    m.def("lora_linear_backward", [](int64_t M, int64_t N, int64_t K, uintptr_t x, int64_t x_stride, int x_dtype,
                                     uintptr_t weight, int64_t weight_n, int64_t weight_k, int weight_dtype,
                                     double dropout_p, uint64_t seed, int threads, uintptr_t A, int64_t A_stride,
                                     uintptr_t B, int64_t B_n, int64_t B_r, int rank, int activation, float scaling,
                                     uintptr_t bias_A, uintptr_t bias_B, int dtype, uintptr_t dy, int64_t dy_stride,
                                     int dy_dtype, uintptr_t dx, int64_t dx_stride, uintptr_t z, int64_t z_stride,
                                     int64_t dA, int64_t dB, int64_t da, int64_t dbeta) {
        const LinearArgs args = linear_args(M, N, K, x, x_stride, x_dtype, weight, weight_n, weight_k, weight_dtype,
                                            dropout_p, seed, threads);
        const int64_t grads[4] = {dA, dB, da, dbeta};
        call_backward(args, table_of_one(A, A_stride, B, B_n, B_r, rank, activation, scaling, bias_A, bias_B, dtype), 0,
                      dy, dy_stride, dy_dtype, dx, dx_stride, z, z_stride, grads);
    });
    m.def("multi_lora_linear_backward",
          [](int64_t M, int64_t N, int64_t K, uintptr_t x, int64_t x_stride, int x_dtype, uintptr_t weight,
             int64_t weight_n, int64_t weight_k, int weight_dtype, double dropout_p, uint64_t seed, int threads,
             uintptr_t pages, uintptr_t rows, uintptr_t scaling, uintptr_t biases, int count, int dtype, uintptr_t ids,
             uintptr_t dy, int64_t dy_stride, int dy_dtype, uintptr_t dx, int64_t dx_stride, uintptr_t z,
             int64_t z_stride, uintptr_t grads) {
              const LinearArgs args = linear_args(M, N, K, x, x_stride, x_dtype, weight, weight_n, weight_k,
                                                  weight_dtype, dropout_p, seed, threads);
              call_backward(args, table_of(pages, rows, scaling, biases, count, dtype), ids, dy, dy_stride, dy_dtype,
                            dx, dx_stride, z, z_stride, address<int64_t>(grads));
          });
}

}  // namespace

}  // namespace peftk

// Without a GIL too: calls share nothing but the level in use, which is atomic, and the threads, which have a lock;
// scratch memory is each thread's own.
PYBIND11_MODULE(_cpu, m, pybind11::mod_gil_not_used()) {
    m.def("borrows_openmp", peftk::borrows_openmp, "Whether jobs run on torch's OpenMP threads, not on our own.");
    m.def("pool_workers", peftk::pool_workers, "Worker threads that this process has started.");
    peftk::bind_levels(m);
    peftk::bind_lora_linear(m);
    peftk::bind_merge(m);
    peftk::bind_direct_calls(m.ptr());
    peftk::bind_peak(m);
}
