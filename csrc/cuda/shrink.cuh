// shrink: z[m] = x[m] A_iᵀ + a_i, for 8 rows, 16 ranks and one range of K.
//
// Computes zᵀ = A xᵀ on the tensor cores: the ranks are the 16 rows of their product, the rows of x its 8 columns. All
// data is read once, so it is loaded directly into registers. The order of a sum is free: for both A and x a thread
// uses 8 neighbouring k, which are one 128-bit load, where the tensor cores expect k = 2t, 2t + 1, 2t + 8 and 2t + 9.
#pragma once

#include <cstring>
#include <type_traits>

#include "cuda/rows.cuh"
#include "cuda/terms.cuh"
#include "cuda/tickets.cuh"

namespace peftk::cuda::shrink {

constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr int kRows = 8;               // of x, in a tile
constexpr int kSlab = 32;              // values of k that a warp processes together
constexpr int kStep = kSlab * kWarps;  // the warps of a block take slabs in turn
constexpr int kInFlight = 4;           // slabs whose loads a warp has in flight

struct Segment {
    int from, to;  // rows of the tile
    int ranks;     // on the page, of 16
    bool aligned;
    int64_t A, stride;
};

struct Shared {
    Segment segments[kRows];
    int segment_count;
    float part[kWarps][kRows][kPage];
};

template <typename T>
struct Eight {
    T value[8];
};

template <typename T>
__device__ inline Eight<T> load_eight(const T* from, bool exists, bool aligned) {
    Eight<T> eight{};
    if (exists && aligned) {
        constexpr int kWords = sizeof(eight) / sizeof(uint4);
        uint4 words[kWords];
#pragma unroll
        for (int i = 0; i < kWords; ++i) words[i] = reinterpret_cast<const uint4*>(from)[i];
        memcpy(&eight, words, sizeof(eight));
    } else if (exists) {
#pragma unroll
        for (int i = 0; i < 8; ++i) eight.value[i] = from[i];
    }
    return eight;
}

// A thread's part of a slab: 8 values of k of one row of x and of two ranks.
template <typename T, typename A>
struct Slab {
    Eight<T> x;
    Eight<A> low, high;
};

// sum += the products of a slab. These are first summed on the tensor cores, small terms first, and then added in fp32,
// since tensor cores truncate sums (cuda/terms.cuh).
template <typename T, typename A>
__device__ inline void multiply_slab(float (&sum)[4], const Slab<T, A>& slab) {
    float part[4] = {};
    if constexpr (std::is_same_v<T, A>) {
        uint32_t x[4], low[4], high[4];
        memcpy(x, &slab.x, sizeof(x));
        memcpy(low, &slab.low, sizeof(low));
        memcpy(high, &slab.high, sizeof(high));
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
            const uint32_t a[4] = {low[i], high[i], low[i + 1], high[i + 1]}, b[2] = {x[i], x[i + 1]};
            multiply(part, a, b, T{});
        }
    } else {
#pragma unroll
        for (int i = 0; i < 8; i += 4) {
            uint32_t x[2][kTerms<T>], low[2][kTerms<A>], high[2][kTerms<A>];
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const int k = i + 2 * j;
                split_terms(widen(slab.x.value[k]), widen(slab.x.value[k + 1]), x[j]);
                split_terms(widen(slab.low.value[k]), widen(slab.low.value[k + 1]), low[j]);
                split_terms(widen(slab.high.value[k]), widen(slab.high.value[k + 1]), high[j]);
            }
#pragma unroll
            for (int p = kTerms<A> - 1; p >= 0; --p)
#pragma unroll
                for (int q = kTerms<T> - 1; q >= 0; --q) {
                    const uint32_t a[4] = {low[0][p], high[0][p], low[1][p], high[1][p]}, b[2] = {x[0][q], x[1][q]};
                    multiply_bf16(part, a, b);
                }
        }
    }
#pragma unroll
    for (int c = 0; c < 4; ++c) sum[c] += part[c];
}

// Finds the segments of a tile whose adapters have ranks on the page.
template <typename A, int kAllRows>
__device__ inline void find_segments(const LoraLinearArgs& args, const Rows<kAllRows>& rows, int first_row,
                                     const Slice& slice, int page, Shared& shared) {
    if (threadIdx.x < 32) {
        const int lane = threadIdx.x, place = first_row + lane;
        const bool inside = lane < kRows && place < args.M;
        const int id = inside ? rows.id[place] : -1;
        const bool head = id >= 0 && (lane == 0 || rows.id[place - 1] != id);
        const Adapter adapter = head ? adapter_at(args.adapters, slice.first_entry + id) : Adapter{};
        const bool listed = head && adapter.rank > page * kPage;
        const uint32_t all = __ballot_sync(0xffffffff, listed);
        if (listed) {
            const Page p = page_at(args.adapters, adapter.first_page + page);
            int to = lane + 1;
            while (to < kRows && first_row + to < args.M && rows.id[first_row + to] == id) ++to;
            const bool aligned = ((p.A | p.stride_A * int64_t(sizeof(A))) & 15) == 0;
            shared.segments[__popc(all & ((1u << lane) - 1))] = {lane,    to,  min(adapter.rank - page * kPage, kPage),
                                                                 aligned, p.A, p.stride_A};
        }
        if (lane == 0) shared.segment_count = __popc(all);
    }
    __syncthreads();
}

// Computes one split of a tile. The last split to arrive sums them, stores the tile's part of z and publishes it.
template <typename T, typename A, int kAllRows>
__device__ inline void tile(const LoraLinearArgs& args, const LoraLinearPlan& plan, int number,
                            const Rows<kAllRows>& rows, Shared& shared, int& broadcast) {
    const int splits = plan.shrink_splits, split = number % splits, tile_index = number / splits;
    const int first_row = tile_index / args.adapters.z_pages * kRows, z_page = tile_index % args.adapters.z_pages;
    int s = 0;
    Slice slice = slice_at(args.adapters, 0, args.N);
    while (z_page >= slice.end_page) slice = slice_at(args.adapters, ++s, args.N);
    const int page = z_page - slice.first_page;
    find_segments<A>(args, rows, first_row, slice, page, shared);

    const Range range = range_of(split, splits, args.K, kStep);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int place = first_row + g;
    const T* x = static_cast<const T*>(args.x) + int64_t(place < args.M ? rows.row[place] : 0) * args.x_stride;

    // For each segment, all slabs. A row's sums come from the product with its own adapter only, so that inf or NaN of
    // another adapter does not reach it.
    const int first_k = range.from + warp * kSlab;
    const int slabs = first_k < range.to ? (range.to - first_k + kStep - 1) / kStep : 0;
    const int items = slabs * shared.segment_count;
    float sum[4] = {}, total[4] = {};
    for (int first = 0; first < items; first += kInFlight) {
        Slab<T, A> slab[kInFlight];
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) {
            if (first + i >= items) break;
            const Segment& segment = shared.segments[(first + i) / slabs];
            const int k = first_k + (first + i) % slabs * kStep + 8 * t;
            const A* ranks = reinterpret_cast<const A*>(segment.A) + g * segment.stride + k;
            const bool exists = k < range.to;
            slab[i].x = load_eight(x + k, exists && place < args.M, true);
            slab[i].low = load_eight(ranks, exists && g < segment.ranks, segment.aligned);
            slab[i].high = load_eight(ranks + 8 * segment.stride, exists && g + 8 < segment.ranks, segment.aligned);
        }
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) {
            if (first + i >= items) break;
            multiply_slab(sum, slab[i]);
            if ((first + i) % slabs < slabs - 1) continue;
            const Segment& segment = shared.segments[(first + i) / slabs];
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                const int row = 2 * t + c % 2;
                if (row >= segment.from && row < segment.to) total[c] = sum[c];
                sum[c] = 0.0f;
            }
        }
    }

    // From here on a thread has one element of the tile. Warps and splits are summed in order.
#pragma unroll
    for (int c = 0; c < 4; ++c) shared.part[warp][2 * t + c % 2][g + c / 2 * 8] = total[c];
    __syncthreads();
    const int row = threadIdx.x / kPage, lane_rank = threadIdx.x % kPage;
    float z = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) z += shared.part[w][row][lane_rank];
    if (splits > 1) {
        float* parts = args.partials + int64_t(tile_index) * splits * kThreads + threadIdx.x;
        parts[split * kThreads] = z;
        if (!tickets::arrive_last(args.counters + tickets::kArrivals + tile_index, splits, broadcast)) return;
        z = 0.0f;
#pragma unroll 8
        for (int other = 0; other < splits; ++other) z += parts[other * kThreads];
    }
    if (first_row + row < args.M) {
        const int id = rows.id[first_row + row], r = page * kPage + lane_rank;
        const Adapter adapter = id >= 0 ? adapter_at(args.adapters, slice.first_entry + id) : Adapter{};
        float* to = args.z + int64_t(rows.row[first_row + row]) * args.adapters.z_pages * kPage;
        if (r < adapter.rank) {
            const A* bias = reinterpret_cast<const A*>(adapter.bias_A);
            to[z_page * kPage + lane_rank] = bias ? z + widen(bias[r]) : z;
        } else if (args.z_dense) {
            to[z_page * kPage + lane_rank] = 0.0f;
        }
    }
    tickets::publish(args.counters);
}

}  // namespace peftk::cuda::shrink
