// W' = round(fl(W + d)) and back, with d in one fixed chain of roundings (docs/merge.md): one pass over W, in place.
//
// A block owns a tile of one layer of the list. It processes the ranks of each adapter in chunks: a chunk of A and of B
// is widened to fp32 into shared memory, and every thread extends the chains of its kRows x kColumns outputs in
// registers. A thread reads its columns of a row of W with one 128-bit access. Each rounding is an explicit intrinsic,
// so the compiler contracts nothing, and no denormal is flushed.

#include "cuda/merge.h"

#include "cuda/merge_tile.cuh"

namespace peftk::cuda {
namespace {

using namespace merging;

template <typename W, typename Adapter>
__global__ void __launch_bounds__(kThreads, 2) merge_kernel(MergeList list, MergeNotes notes) {
    using T = Tile<W>;
    using S = Storage<W>;
    const int tile = blockIdx.x;
    const bool done = notes.merged[tile];
    auto& shared = shared_memory<Shared<W>>();
    const MergeLayer& layer = shared.layer;
    const Place<W> place = find_tile(list, tile, shared);
    if (done) return;
    float d[T::kRows][T::kColumns];
    delta<W, Adapter>(d, list, place, shared);

    W* const weight = static_cast<W*>(layer.weight) + place.row * layer.stride + place.column;
    Vector<W, T::kColumns> w[T::kRows] = {};
    load(w, weight, layer.stride, place);
    Vector<int8_t, T::kColumns> code[T::kRows];
    bool finite = true;
    uint32_t raw = 0;  // one bit per output of the thread
#pragma unroll
    for (int n = 0; n < T::kRows; ++n)
#pragma unroll
        for (int c = 0; c < T::kColumns; ++c) {
            const W before = w[n].lane[c], after = S::round(__fadd_rn(widen(before), d[n][c]));
            const W back = S::round(__fsub_rn(widen(after), d[n][c]));
            const auto distance = merge_code::encode<uint32_t, S::kMagnitude>(S::bits(before), S::bits(back));
            w[n].lane[c] = after;
            code[n].lane[c] = int8_t(distance);
            finite &= (S::bits(after) & S::kMagnitude) < S::kInfinity;
            raw |= uint32_t(distance == merge_code::kRaw) << (n * T::kColumns + c);
        }

    // W is written only once the whole tile is known to be finite and its raw weights have room.
    if (!finite) atomicOr(&shared.refused, 1);
    int slot = raw ? atomicAdd(&shared.raw, __popc(raw)) : 0;
    __syncthreads();
    if (shared.refused) {
        if (threadIdx.x == 0) atomicOr(notes.refused + shared.layer_index, 1);
        return;
    }
    if (shared.raw > 0) {
        if (threadIdx.x == 0) shared.first_slot = atomicAdd(notes.raw_count, shared.raw);
        __syncthreads();
        if (shared.first_slot < 0 || shared.first_slot > notes.room - shared.raw) return;  // below 0: 2^31 raw weights
        for (slot += shared.first_slot; raw; raw &= raw - 1, ++slot) {
            const int output = __ffs(raw) - 1, n = output / T::kColumns, c = output % T::kColumns;
            notes.raw_keys[slot] = layer.first_weight + (place.row + n) * layer.K + place.column + c;
            static_cast<W*>(notes.raw_values)[slot] = weight[n * layer.stride + c];
        }
    }

    store(weight, w, layer.stride, place);
    store(layer.code + place.row * layer.K + place.column, code, layer.K, place);
    uint32_t share[T::kRows];
    sum_columns(share, w, place.column);
    add_row_sums(notes.row_sums + layer.first_row + place.row, share, place.rows);
    if (threadIdx.x == 0) notes.merged[tile] = 1;
}

template <typename W, typename Adapter>
__global__ void __launch_bounds__(kThreads, 2) unmerge_kernel(MergeList list, const int8_t* merged) {
    using T = Tile<W>;
    using S = Storage<W>;
    const int tile = blockIdx.x;
    const bool done = !merged[tile];
    auto& shared = shared_memory<Shared<W>>();
    const MergeLayer& layer = shared.layer;
    const Place<W> place = find_tile(list, tile, shared);
    if (done) return;
    float d[T::kRows][T::kColumns];
    delta<W, Adapter>(d, list, place, shared);

    W* const weight = static_cast<W*>(layer.weight) + place.row * layer.stride + place.column;
    Vector<W, T::kColumns> w[T::kRows] = {};
    Vector<int8_t, T::kColumns> code[T::kRows] = {};
    load(w, weight, layer.stride, place);
    load(code, layer.code + place.row * layer.K + place.column, layer.K, place);
#pragma unroll
    for (int n = 0; n < T::kRows; ++n)
#pragma unroll
        for (int c = 0; c < T::kColumns; ++c) {
            const W back = S::round(__fsub_rn(widen(w[n].lane[c]), d[n][c]));
            const uint32_t distance = uint32_t(int32_t(code[n].lane[c]));
            w[n].lane[c] = S::from_bits(merge_code::decode<uint32_t, S::kMagnitude>(S::bits(back), distance));
        }
    store(weight, w, layer.stride, place);
}

template <typename W>
__global__ void __launch_bounds__(kThreads)
    restore_kernel(MergeList list, const int64_t* raw_keys, const W* raw_values, int64_t count) {
    const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    if (i >= count || raw_keys[i] < 0) return;
    const MergeLayer& layer = list.table[layer_of<&MergeLayer::first_weight>(list.table, list.layers, raw_keys[i])];
    const int64_t within = raw_keys[i] - layer.first_weight;
    static_cast<W*>(layer.weight)[within / layer.K * layer.stride + within % layer.K] = raw_values[i];
}

template <typename W>
__global__ void __launch_bounds__(kThreads) sum_rows_kernel(MergeList list, uint32_t* row_sums) {
    using T = Tile<W>;
    auto& shared = shared_memory<Shared<W>>();
    const MergeLayer& layer = shared.layer;
    const Place<W> place = find_tile(list, int(blockIdx.x), shared);
    const W* const weight = static_cast<const W*>(layer.weight) + place.row * layer.stride + place.column;
    Vector<W, T::kColumns> w[T::kRows] = {};
    load(w, weight, layer.stride, place);
    uint32_t share[T::kRows];
    sum_columns(share, w, place.column);
    add_row_sums(row_sums + layer.first_row + place.row, share, place.rows);
}

template <typename... Parameters, typename... Arguments>
Status launch(void (*kernel)(Parameters...), int64_t blocks, size_t shared, int device, cudaStream_t stream,
              const Arguments&... arguments) {
    if (blocks > INT32_MAX) return Unsupported::kSize;
    if (blocks == 0) return cudaSuccess;
    const DeviceGuard guard(device);
    if (guard.status() != cudaSuccess) return guard.status();
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(unsigned(blocks));
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}

// call(W{}) with the storage type of a dtype.
template <typename Call>
Status with_type(Dtype dtype, const Call& call) {
    switch (dtype) {
        case Dtype::kFloat32: return call(float{});
        case Dtype::kBFloat16: return call(__nv_bfloat16{});
        case Dtype::kFloat16: return call(__half{});
    }
    return Unsupported::kDtype;
}

template <typename Call>
Status with_types(const MergeList& list, const Call& call) {
    return with_type(list.weight_dtype, [&](auto weight) {
        return with_type(list.adapter_dtype, [&](auto adapter) { return call(weight, adapter); });
    });
}

}  // namespace

MergeTile merge_tile(Dtype weight_dtype) {
    if (weight_dtype == Dtype::kFloat32) return {Tile<float>::kDown, Tile<float>::kAcross, sizeof(Shared<float>)};
    return {Tile<__half>::kDown, Tile<__half>::kAcross, sizeof(Shared<__half>)};
}

Status merge(const MergeList& list, const MergeNotes& notes, int device, cudaStream_t stream) {
    return with_types(list, [&](auto w, auto a) {
        using W = decltype(w);
        return launch(merge_kernel<W, decltype(a)>, list.tiles, sizeof(Shared<W>), device, stream, list, notes);
    });
}

Status unmerge(const MergeList& list, const int8_t* merged, int device, cudaStream_t stream) {
    return with_types(list, [&](auto w, auto a) {
        using W = decltype(w);
        return launch(unmerge_kernel<W, decltype(a)>, list.tiles, sizeof(Shared<W>), device, stream, list, merged);
    });
}

Status restore(const MergeList& list, const int64_t* raw_keys, const void* raw_values, int64_t count, int device,
               cudaStream_t stream) {
    return with_type(list.weight_dtype, [&](auto w) {
        using W = decltype(w);
        const int64_t blocks = (count + kThreads - 1) / kThreads;
        return launch(restore_kernel<W>, blocks, 0, device, stream, list, raw_keys, static_cast<const W*>(raw_values),
                      count);
    });
}

Status sum_rows(const MergeList& list, uint32_t* row_sums, int device, cudaStream_t stream) {
    return with_type(list.weight_dtype, [&](auto w) {
        using W = decltype(w);
        return launch(sum_rows_kernel<W>, list.tiles, sizeof(Shared<W>), device, stream, list, row_sums);
    });
}

}  // namespace peftk::cuda
