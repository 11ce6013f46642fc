// A block's tile of W, and the part of each thread.
#pragma once

#include <cstring>

#include "common/merge.h"
#include "cuda/instructions.cuh"
#include "cuda/merge.h"
#include "cuda/storage.cuh"

namespace peftk::cuda::merging {

constexpr int kThreads = 256;
constexpr int kThreadsAcross = 16;                       // threads along the columns of a tile
constexpr int kThreadsDown = kThreads / kThreadsAcross;  // and along its rows
constexpr int kOutputs = 32;                             // of a thread: chains in registers
constexpr int kChunk = 16;                               // ranks in shared memory at a time
constexpr int kLoadsInFlight = 4;                        // loads of A or B that a thread has in flight

template <typename W>
struct Tile {
    static constexpr int kColumns = 16 / sizeof(W);    // of a thread: one 128-bit access
    static constexpr int kRows = kOutputs / kColumns;  // of a thread
    static constexpr int kAcross = kThreadsAcross * kColumns;
    static constexpr int kDown = kThreadsDown * kRows;
    // Padded by four floats, which spreads the column-wise stores of B's chunk over the banks.
    static constexpr int kPitch = kDown + 4;
};

template <typename W>
struct Shared {
    float A[kChunk][Tile<W>::kAcross];
    float B[kChunk][Tile<W>::kPitch];
    MergeLayer layer;
    int layer_index;  // of the layer in the list
    int refused;      // 1 if any W' of the tile would not be finite
    int raw;          // number of raw weights of the tile
    int first_slot;   // index of the first one's slot
};

// A thread's outputs: kRows rows of kColumns columns, some of which may be outside W.
template <typename W>
struct Place {
    int first_row, first_column;  // the tile's
    int row, column;              // the thread's
    int rows, columns;            // how many of the thread's are inside W
    bool vectorized;              // whether a row's columns are read with one access
};

// The layer of a tile or weight, by bisection of the table's column kFirst.
template <int64_t MergeLayer::* kFirst>
__device__ inline int layer_of(const MergeLayer* table, int layers, int64_t item) {
    int low = 0, high = layers;
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        (table[middle].*kFirst > item ? high : low) = middle;
    }
    return low;
}

// Finds the thread's part of a tile, and copies the tile's layer to shared memory, where it needs no registers.
template <typename W>
__device__ inline Place<W> find_tile(const MergeList& list, int tile, Shared<W>& shared) {
    using T = Tile<W>;
    constexpr int kWords = sizeof(MergeLayer) / sizeof(int64_t);
    const unsigned thread = threadIdx.x;
    if (thread < kWords) {
        const int layer = layer_of<&MergeLayer::first_tile>(list.table, list.layers, tile);
        const auto* from = reinterpret_cast<const int64_t*>(list.table + layer);
        reinterpret_cast<int64_t*>(&shared.layer)[thread] = from[thread];
        if (thread == 0) shared.layer_index = layer, shared.refused = 0, shared.raw = 0;
    }
    __syncthreads();
    const MergeLayer& layer = shared.layer;
    const unsigned index = unsigned(tile - layer.first_tile), across = unsigned(layer.tiles_across);
    Place<W> place;
    place.first_row = index / across * T::kDown;
    place.first_column = index % across * T::kAcross;
    place.row = place.first_row + int(thread / kThreadsAcross * T::kRows);
    place.column = place.first_column + int(thread % kThreadsAcross * T::kColumns);
    place.rows = max(0, min(T::kRows, int(layer.N) - place.row));
    place.columns = max(0, min(T::kColumns, int(layer.K) - place.column));
    place.vectorized = layer.aligned && place.columns == T::kColumns;
    return place;
}

// A thread's columns of one row. They are loaded and stored as one word if `vectorized`, else one by one. Words use the
// streaming instructions, since each byte is accessed only once.
template <typename T, int kColumns>
struct Vector {
    T lane[kColumns];
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

// Loads a thread's rows, `stride` elements apart. All of their loads are in flight together.
template <typename T, typename W, int kColumns, int kRows>
__device__ inline void load(Vector<T, kColumns> (&to)[kRows], const T* from, int64_t stride, const Place<W>& place) {
    if (place.vectorized) {
#pragma unroll
        for (int n = 0; n < kRows; ++n) {
            if (n >= place.rows) continue;
            const auto word = __ldcs(reinterpret_cast<const typename Word<sizeof(to[n])>::Type*>(from + n * stride));
            memcpy(&to[n], &word, sizeof(word));
        }
    } else {
#pragma unroll
        for (int n = 0; n < kRows; ++n)
#pragma unroll
            for (int c = 0; c < kColumns; ++c)
                if (n < place.rows && c < place.columns) to[n].lane[c] = from[n * stride + c];
    }
}

template <typename T, typename W, int kColumns, int kRows>
__device__ inline void store(T* to, const Vector<T, kColumns> (&from)[kRows], int64_t stride, const Place<W>& place) {
    if (place.vectorized) {
#pragma unroll
        for (int n = 0; n < kRows; ++n) {
            if (n >= place.rows) continue;
            typename Word<sizeof(from[n])>::Type word;
            memcpy(&word, &from[n], sizeof(word));
            __stcs(reinterpret_cast<decltype(word)*>(to + n * stride), word);
        }
    } else {
#pragma unroll
        for (int n = 0; n < kRows; ++n)
#pragma unroll
            for (int c = 0; c < kColumns; ++c)
                if (n < place.rows && c < place.columns) to[n * stride + c] = from[n].lane[c];
    }
}

// A column's index in the shared rows of A. Each thread reads its columns as float4s. The first float4s of all threads
// are stored side by side, then the second ones, so that the threads of a quarter warp have no bank conflicts.
template <typename W>
__device__ inline int shared_column(unsigned column) {
    constexpr int kColumns = Tile<W>::kColumns;
    const unsigned thread = column / kColumns, within = column % kColumns;
    return (within / 4 * kThreadsAcross + thread) * 4 + within % 4;
}

// Calls to(i, from(i)) for all i, with several loads before the stores.
template <int kCount, typename From, typename To>
__device__ inline void copy(const From& from, const To& to) {
#pragma unroll
    for (int first = 0; first < kCount; first += kLoadsInFlight) {
        float value[kLoadsInFlight];
#pragma unroll
        for (int i = 0; i < kLoadsInFlight; ++i) value[i] = from(first + i);
#pragma unroll
        for (int i = 0; i < kLoadsInFlight; ++i) to(first + i, value[i]);
    }
}

// d of the thread's outputs: Σ scaling · chain over the layer's adapters, in order. A chain is one fma per rank. d
// starts at -0, since -0 + t = t for every t of either sign. Ranks are processed in chunks, widened into shared memory.
// Ends with a barrier.
template <typename W, typename Adapter>
__device__ inline void delta(float (&d)[Tile<W>::kRows][Tile<W>::kColumns], const MergeList& list,
                             const Place<W>& place, Shared<W>& shared) {
    using T = Tile<W>;
    const MergeLayer& layer = shared.layer;
    const unsigned thread = threadIdx.x, across = thread % kThreadsAcross, down = thread / kThreadsAcross;
#pragma unroll
    for (int n = 0; n < T::kRows; ++n)
#pragma unroll
        for (int c = 0; c < T::kColumns; ++c) d[n][c] = -0.0f;

    int rank = 0;
    const int end_adapter = int(layer.end_adapter);
    for (int adapter = int(layer.first_adapter); adapter < end_adapter; ++adapter) {
        float chain[T::kRows][T::kColumns] = {};
        for (const int end = list.ends[adapter]; rank < end;) {
            const int ranks = min(kChunk, end - rank);
            // Neighbouring threads read A along its columns and B along its ranks, which are contiguous in memory.
            const int64_t K = layer.K, R = layer.R;
            const auto* A = static_cast<const Adapter*>(layer.lora_A) + rank * K + place.first_column;
            const auto* B = static_cast<const Adapter*>(layer.lora_B) + place.first_row * R + rank;
            const int columns = int(K) - place.first_column, rows = int(layer.N) - place.first_row;
            const int c = int(thread % T::kAcross), first_r = int(thread / T::kAcross);
            copy<kChunk * T::kAcross / kThreads>(
                [&](int i) {
                    const int r = first_r + i * (kThreads / T::kAcross);
                    return r < ranks && c < columns ? widen(A[r * K + c]) : 0.0f;
                },
                [&](int i, float a) { shared.A[first_r + i * (kThreads / T::kAcross)][shared_column<W>(c)] = a; });
            const int r = int(thread % kChunk), first_n = int(thread / kChunk);
            copy<kChunk * T::kDown / kThreads>(
                [&](int i) {
                    const int n = first_n + i * (kThreads / kChunk);
                    return r < ranks && n < rows ? widen(B[n * R + r]) : 0.0f;
                },
                [&](int i, float b) { shared.B[r][first_n + i * (kThreads / kChunk)] = b; });
            __syncthreads();
            for (int r = 0; r < ranks; ++r) {
                float a[T::kColumns], b[T::kRows];
#pragma unroll
                for (int c = 0; c < T::kColumns; c += 4) {
                    const float4 v = *reinterpret_cast<const float4*>(&shared.A[r][c * kThreadsAcross + across * 4]);
                    a[c] = v.x, a[c + 1] = v.y, a[c + 2] = v.z, a[c + 3] = v.w;
                }
#pragma unroll
                for (int n = 0; n < T::kRows; n += 4) {
                    const float4 v = *reinterpret_cast<const float4*>(&shared.B[r][down * T::kRows + n]);
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
        const float scaling = list.scaling[adapter];
#pragma unroll
        for (int n = 0; n < T::kRows; ++n)
#pragma unroll
            for (int c = 0; c < T::kColumns; ++c) d[n][c] = __fadd_rn(d[n][c], __fmul_rn(scaling, chain[n][c]));
    }
}

// share[n] = Σ (2k + 1) · bits modulo 2³² of the thread's row n. For 16-bit values, bits and 2k + 1 are signed 16-bit.
template <typename W, int kColumns, int kRows>
__device__ inline void sum_columns(uint32_t (&share)[kRows], const Vector<W, kColumns> (&w)[kRows], int column) {
#pragma unroll
    for (int n = 0; n < kRows; ++n) {
        share[n] = 0;
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
            const int odd = 2 * (column + c) + 1;
            const uint32_t multiplier = sizeof(W) == 2 ? uint32_t(int32_t(int16_t(odd))) : uint32_t(odd);
            share[n] += multiplier * Storage<W>::bits(w[n].lane[c]);
        }
    }
}

// Adds the threads' shares to the sums of their rows. All threads must call it. Threads side by side have the same
// rows: they exchange halves of them until each has the tile's whole share of one row.
template <int kRows>
__device__ inline void add_row_sums(uint32_t* sums, uint32_t (&share)[kRows], int rows) {
    static_assert(kThreadsAcross % kRows == 0, "as many threads as rows, or more");
    const int across = int(threadIdx.x % kThreadsAcross);
    int row = 0;
#pragma unroll
    for (int lanes = kThreadsAcross / 2, half = kRows / 2; lanes > 0; lanes /= 2, half /= 2) {
        const bool upper = across & lanes;
        if (half == 0) share[0] += __shfl_xor_sync(~0u, share[0], lanes);
#pragma unroll
        for (int n = 0; n < half; ++n) {
            const uint32_t sent = upper ? share[n] : share[n + half];
            share[n] = (upper ? share[n + half] : share[n]) + __shfl_xor_sync(~0u, sent, lanes);
        }
        row += upper ? half : 0;
    }
    if (across % (kThreadsAcross / kRows) == 0 && row < rows) atomicAdd(sums + row, share[0]);
}

}  // namespace peftk::cuda::merging
