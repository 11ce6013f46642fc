// W' = round(fl(W + d)) and back, with d in one fixed chain of roundings (docs/merge.md): one pass over W.
//
// A block owns a tile of W. The ranks of each adapter go by in chunks: a chunk of A and of B is widened to fp32 into
// shared memory, and every thread extends the chains of its kRows x kColumns outputs, which stay in registers. The
// columns of a thread make one 128-bit access of W. Each rounding is an explicit intrinsic: nothing is left for the
// compiler to contract, and none of them flushes denormals.

#include "cuda/merge.h"

#include <algorithm>
#include <cstring>

#include "cuda/instructions.cuh"
#include "cuda/storage.cuh"

namespace peftk::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kThreadsAcross = 16;                       // threads along the columns of a tile
constexpr int kThreadsDown = kThreads / kThreadsAcross;  // and along its rows
constexpr int kOutputs = 32;                             // a thread: chains in registers
constexpr int kChunk = 16;                               // ranks in shared memory at a time
constexpr int kBatch = 2;                                // rows of a thread whose loads are in flight together

template <typename W>
struct Tile {
    static constexpr int kColumns = 16 / sizeof(W);    // of a thread: one 128-bit access
    static constexpr int kRows = kOutputs / kColumns;  // of a thread
    static constexpr int kAcross = kThreadsAcross * kColumns;
    static constexpr int kDown = kThreadsDown * kRows;
    // Four floats more than a row, which spreads the column-wise stores of B's chunk over the banks.
    static constexpr int kPitch = kDown + 4;
};

// A chunk of A and of B, widened.
template <typename W>
struct alignas(16) Shared {
    float A[kChunk][Tile<W>::kAcross];
    float B[kChunk][Tile<W>::kPitch];
};

// A column's place in the shared rows of A. Each thread reads its columns as float4s; with the first float4s of all
// threads side by side, then the second, no two threads of a quarter warp meet in a bank.
template <typename W>
__device__ inline int shared_column(int column) {
    constexpr int kColumns = Tile<W>::kColumns;
    const int thread = column / kColumns, within = column % kColumns;
    return (within / 4 * kThreadsAcross + thread) * 4 + within % 4;
}

// A vector of a thread's columns, moved as one word where that is allowed, else one by one up to `valid`.
// The streaming forms: each byte is touched once.
template <typename T, int kCount>
struct Vector {
    T lane[kCount];
};

template <int kBytes>
struct Word;
template <>
struct Word<16> {
    using Type = uint4;
};
template <>
struct Word<8> {
    using Type = uint2;
};
template <>
struct Word<4> {
    using Type = unsigned;
};

template <typename T, int kCount>
__device__ inline Vector<T, kCount> load(const T* from, bool whole, int valid) {
    Vector<T, kCount> v{};
    if (whole) {
        const auto word = __ldcs(reinterpret_cast<const typename Word<sizeof(v)>::Type*>(from));
        memcpy(&v, &word, sizeof(v));
    } else {
#pragma unroll
        for (int c = 0; c < kCount; ++c)
            if (c < valid) v.lane[c] = from[c];
    }
    return v;
}

template <typename T, int kCount>
__device__ inline void store(T* to, const Vector<T, kCount>& v, bool whole, int valid) {
    if (whole) {
        typename Word<sizeof(v)>::Type word;
        memcpy(&word, &v, sizeof(v));
        __stcs(reinterpret_cast<decltype(word)*>(to), word);
    } else {
#pragma unroll
        for (int c = 0; c < kCount; ++c)
            if (c < valid) to[c] = v.lane[c];
    }
}

template <typename W, typename Adapter, bool kUnmerge>
__global__ void __launch_bounds__(kThreads, 2) merge_kernel(MergeArgs args, bool aligned) {
    using T = Tile<W>;
    using S = Storage<W>;
    auto& [shared_A, shared_B] = shared_memory<Shared<W>>();

    const MergeFactors& factors = args.factors;
    const auto* A = static_cast<const Adapter*>(factors.lora_A);
    const auto* B = static_cast<const Adapter*>(factors.lora_B);
    const int thread = threadIdx.x;
    const int across = thread % kThreadsAcross, down = thread / kThreadsAcross;
    const int64_t first_column = int64_t(blockIdx.x) * T::kAcross;
    const int64_t column = first_column + across * T::kColumns;
    const int64_t tiles_down = (args.N + T::kDown - 1) / T::kDown;

    // The grid's second dimension has a limit that N may pass, so a block may own several tiles of a column.
    for (int64_t tile = blockIdx.y; tile < tiles_down; tile += gridDim.y) {
        const int64_t first_row = tile * T::kDown;
        const int64_t row = first_row + down * T::kRows;

        float d[T::kRows][T::kColumns];
        int64_t rank = 0;
        for (int64_t adapter = 0; adapter < factors.adapters; ++adapter) {
            float chain[T::kRows][T::kColumns] = {};
            for (const int64_t end = factors.ends[adapter]; rank < end;) {
                const int ranks = int(min(int64_t(kChunk), end - rank));
                // Threads walk A along its columns and B along its ranks, as both lie in memory. Outside W anything
                // will do; outside the adapter the chain must end, since adding even a zero turns -0 into +0.
#pragma unroll 2
                for (int i = thread; i < kChunk * T::kAcross; i += kThreads) {
                    const int r = i / T::kAcross, c = i % T::kAcross;
                    const bool inside = r < ranks && first_column + c < args.K;
                    shared_A[r][shared_column<W>(c)] = inside ? widen(A[(rank + r) * args.K + first_column + c]) : 0.0f;
                }
#pragma unroll 2
                for (int i = thread; i < kChunk * T::kDown; i += kThreads) {
                    const int n = i / kChunk, r = i % kChunk;
                    const bool inside = r < ranks && first_row + n < args.N;
                    shared_B[r][n] = inside ? widen(B[(first_row + n) * factors.R + rank + r]) : 0.0f;
                }
                __syncthreads();
                for (int r = 0; r < ranks; ++r) {
                    float a[T::kColumns], b[T::kRows];
#pragma unroll
                    for (int c = 0; c < T::kColumns; c += 4) {
                        const int place = c * kThreadsAcross + across * 4;
                        const float4 v = *reinterpret_cast<const float4*>(&shared_A[r][place]);
                        a[c] = v.x, a[c + 1] = v.y, a[c + 2] = v.z, a[c + 3] = v.w;
                    }
#pragma unroll
                    for (int n = 0; n < T::kRows; n += 4) {
                        const float4 v = *reinterpret_cast<const float4*>(&shared_B[r][down * T::kRows + n]);
                        b[n] = v.x, b[n + 1] = v.y, b[n + 2] = v.z, b[n + 3] = v.w;
                    }
#pragma unroll
                    for (int n = 0; n < T::kRows; ++n)
#pragma unroll
                        for (int c = 0; c < T::kColumns; ++c) chain[n][c] = __fmaf_rn(b[n], a[c], chain[n][c]);
                }
                __syncthreads();
                rank += ranks;
            }
            const float scaling = factors.scaling[adapter];
#pragma unroll
            for (int n = 0; n < T::kRows; ++n)
#pragma unroll
                for (int c = 0; c < T::kColumns; ++c) {
                    const float share = __fmul_rn(scaling, chain[n][c]);
                    d[n][c] = adapter == 0 ? share : __fadd_rn(d[n][c], share);
                }
        }

        const int valid = int(min(int64_t(T::kColumns), args.K - column));
        const int rows = int(min(int64_t(T::kRows), args.N - row));
        if (valid <= 0 || rows <= 0) continue;
        const bool whole = aligned && valid == T::kColumns;
        const W* from = static_cast<const W*>(args.weight) + row * args.weight_stride + column;
        W* to = static_cast<W*>(args.out) + row * args.out_stride + column;
        int8_t* code = args.code + row * args.K + column;

        // A batch of rows is loaded before the first of them is stored, so that its loads are in flight together: the
        // compiler must not move a load over a store that might alias it.
#pragma unroll
        for (int first = 0; first < T::kRows; first += kBatch) {
            Vector<W, T::kColumns> in[kBatch], out;
            Vector<int8_t, T::kColumns> codes[kBatch];
#pragma unroll
            for (int n = 0; n < kBatch; ++n) {
                if (first + n >= rows) break;
                in[n] = load<W, T::kColumns>(from + (first + n) * args.weight_stride, whole, valid);
                if constexpr (kUnmerge) codes[n] = load<int8_t, T::kColumns>(code + (first + n) * args.K, whole, valid);
            }
#pragma unroll
            for (int n = 0; n < kBatch; ++n) {
                if (first + n >= rows) break;
#pragma unroll
                for (int c = 0; c < T::kColumns; ++c) {
                    const float delta = d[first + n][c];
                    const W w = in[n].lane[c];
                    if constexpr (kUnmerge) {
                        const W back = S::round(__fsub_rn(widen(w), delta));
                        const uint32_t stored = uint32_t(int32_t(codes[n].lane[c]));
                        out.lane[c] = S::from_bits(merge_code::decode<uint32_t, S::kMagnitude>(S::bits(back), stored));
                    } else {
                        out.lane[c] = S::round(__fadd_rn(widen(w), delta));
                        const W back = S::round(__fsub_rn(widen(out.lane[c]), delta));
                        codes[n].lane[c] =
                            int8_t(merge_code::encode<uint32_t, S::kMagnitude>(S::bits(w), S::bits(back)));
                    }
                }
                store(to + (first + n) * args.out_stride, out, whole, valid);
                if constexpr (!kUnmerge) store(code + (first + n) * args.K, codes[n], whole, valid);
            }
        }
    }
}

template <typename W, typename Adapter, bool kUnmerge>
cudaError_t launch(const MergeArgs& args, cudaStream_t stream) {
    using T = Tile<W>;
    constexpr int64_t kGridYLimit = 65535;
    const auto aligned_at = [](const void* pointer, int bytes) {
        return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
    };
    const bool aligned = aligned_at(args.weight, 16) && aligned_at(args.out, 16) &&
                         aligned_at(args.code, T::kColumns) && args.weight_stride % T::kColumns == 0 &&
                         args.out_stride % T::kColumns == 0 && args.K % T::kColumns == 0;
    const int64_t tiles_across = (args.K + T::kAcross - 1) / T::kAcross;
    const int64_t tiles_down = (args.N + T::kDown - 1) / T::kDown;

    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(unsigned(tiles_across), unsigned(std::min(tiles_down, kGridYLimit)));
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = sizeof(Shared<W>);
    config.stream = stream;
    return cudaLaunchKernelEx(&config, merge_kernel<W, Adapter, kUnmerge>, args, aligned);
}

template <typename W, bool kUnmerge>
cudaError_t for_adapter(const MergeArgs& args, cudaStream_t stream) {
    switch (args.factors.dtype) {
        case Dtype::kFloat32: return launch<W, float, kUnmerge>(args, stream);
        case Dtype::kBFloat16: return launch<W, __nv_bfloat16, kUnmerge>(args, stream);
        case Dtype::kFloat16: return launch<W, __half, kUnmerge>(args, stream);
    }
    return cudaErrorInvalidValue;
}

template <bool kUnmerge>
cudaError_t for_weight(const MergeArgs& args, cudaStream_t stream) {
    if (args.N == 0 || args.K == 0) return cudaSuccess;
    switch (args.weight_dtype) {
        case Dtype::kFloat32: return for_adapter<float, kUnmerge>(args, stream);
        case Dtype::kBFloat16: return for_adapter<__nv_bfloat16, kUnmerge>(args, stream);
        case Dtype::kFloat16: return for_adapter<__half, kUnmerge>(args, stream);
    }
    return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t merge(const MergeArgs& args, cudaStream_t stream) { return for_weight<false>(args, stream); }

cudaError_t unmerge(const MergeArgs& args, cudaStream_t stream) { return for_weight<true>(args, stream); }

}  // namespace peftk::cuda
