// expand: y[m] = x[m] Wᵀ + bias + s_i · act(z[m]) B_iᵀ + β_i for all rows, 64 columns of y and one range of K.
//
// Computes yᵀ = W xᵀ on the tensor cores: columns of y are the 16 rows of their product and rows of x its 8 columns, so
// that few rows waste little. A warp owns 16 columns of y; lane group g has the neighbours 2g and 2g + 1. W and x are
// read through a ring of stages in shared memory, filled by asynchronous copies. The adapters are added to the fp32
// sums in registers.
#pragma once

#include <cstring>

#include "common/activation.h"
#include "cuda/rows.cuh"
#include "cuda/terms.cuh"
#include "cuda/tickets.cuh"

namespace peftk::cuda::expand {

constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr int kColumns = 16 * kWarps;  // of y, in a tile
constexpr int kStep = 64;              // of K, in a stage: rows of 128 bytes
constexpr int kChunks = kStep / 8;     // of 16 bytes, the unit of copies
constexpr int kStages = 4;
constexpr int kPages = 4;               // of v that are in shared memory together
constexpr int kPitch = kPages * 8 + 4;  // words per row of v: 8 rows of 4 words have no bank conflicts
constexpr int kInFlight = 4;            // pages of B whose loads are in flight together
constexpr int kTermsOfV = 3;
static_assert(kThreads / kChunks % 16 == 0, "all rows that a thread copies have the same permutation");

// A stage of the ring. Rows are in order, but their chunks are permuted, so that the 8 rows of a matrix that
// `load_matrices` reads at one k have no bank conflicts. Chunk c of row r of x is at c ^ r % 8. Chunk c of row n of W,
// whose matrices have every other row, is at c ^ n / 2 % 8.
template <int kTiles>
struct Stage {
    uint4 weight[kColumns][kChunks];
    uint4 x[8 * kTiles][kChunks];
};

template <int kTiles>
union Shared {
    Stage<kTiles> ring[kStages];
    uint32_t v[kTermsOfV][8 * kTiles][kPitch];  // two ranks per word; used after the main loop
};

// A thread copies one chunk of every kRowStep-th row of W or x.
constexpr int kRowStep = kThreads / kChunks;

template <typename T, int kCount>
struct Source {
    const T* from[kCount];
    bool exists[kCount];
};

template <typename T>
__device__ inline Source<T, kColumns / kRowStep> source_of_weight(const LoraLinearArgs& args, int first_n) {
    const int first = first_n + threadIdx.x / kChunks, chunk = threadIdx.x % kChunks;
    Source<T, kColumns / kRowStep> source;
#pragma unroll
    for (int i = 0; i < kColumns / kRowStep; ++i) {
        const int n = first + i * kRowStep;
        source.exists[i] = n < args.N;
        source.from[i] = static_cast<const T*>(args.weight) + (n < args.N ? n * args.weight_stride : 0) + chunk * 8;
    }
    return source;
}

template <typename T, int kTiles>
__device__ inline Source<T, (kTiles + 1) / 2> source_of_x(const LoraLinearArgs& args, const Rows<8 * kTiles>& rows) {
    const int first = threadIdx.x / kChunks, chunk = threadIdx.x % kChunks;
    Source<T, (kTiles + 1) / 2> source;
#pragma unroll
    for (int i = 0; i < (kTiles + 1) / 2; ++i) {
        const int place = first + i * kRowStep;
        source.exists[i] = place < args.M;
        source.from[i] =
            static_cast<const T*>(args.x) + (place < args.M ? rows.row[place] * args.x_stride : 0) + chunk * 8;
    }
    return source;
}

// Copies one step of K, from `k` on, into a stage; zeros for rows that do not exist and beyond `to_k`. `permuted`: the
// position of this thread's chunk in its rows.
template <typename T, int kCount, int kRows>
__device__ inline void copy(const Source<T, kCount>& source, int k, int to_k, int permuted,
                            uint4 (&to)[kRows][kChunks]) {
    const int row = threadIdx.x / kChunks, chunk = threadIdx.x % kChunks;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
        if (row + i * kRowStep >= kRows) break;
        const bool inside = source.exists[i] && k + chunk * 8 < to_k;
        copy_async_16(&to[row + i * kRowStep][permuted], inside ? source.from[i] + k : source.from[i], inside ? 16 : 0);
    }
}

// sum[j] += the products of a stage for rows 8j … 8j + 7, which are first summed on the tensor cores (cuda/terms.cuh).
template <typename T, int kTiles>
__device__ inline void multiply_stage(const Stage<kTiles>& stage, float (&sum)[kTiles][4]) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, matrix = lane / 8, row = lane % 8;
    // The upper 8 of the product's 16 rows are the even columns of y, the lower 8 the odd ones.
    const int n = warp * 16 + 2 * row + matrix % 2;
    float part[kTiles][4] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        uint32_t a[2][4];
#pragma unroll
        for (int i = 0; i < 2; ++i) load_matrices(a[i], &stage.weight[n][(4 * half + 2 * i + matrix / 2) ^ row]);
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
            uint32_t b[4];
            load_matrices(b, &stage.x[8 * j + row][(4 * half + matrix) ^ row]);
            const uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
            multiply(part[j], a[0], first, T{});
            multiply(part[j], a[1], second, T{});
        }
    }
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
#pragma unroll
        for (int c = 0; c < 4; ++c) sum[j][c] += part[j][c];
}

// A thread's part of a page of B: its two columns, and ranks 2t, 2t + 1, 2t + 8 and 2t + 9.
template <typename A>
struct Up {
    A value[2][4];
};

template <typename A>
struct alignas(2 * sizeof(A)) Pair {
    A value[2];
};

// n: the first of the two rows of B; inside: whether they exist. Two ranks or columns that are neighbours in memory are
// loaded together.
template <typename A>
__device__ inline Up<A> load_up(const Page& page, int ranks, int n, const bool (&inside)[2]) {
    const A* B = reinterpret_cast<const A*>(page.B) + n * page.stride_Bn;
    const int t = threadIdx.x % 4;
    const auto paired = [&](int64_t stride) { return ((page.B | stride * int64_t(sizeof(A))) % (2 * sizeof(A))) == 0; };
    const bool along_r = page.stride_Br == 1 && paired(page.stride_Bn);
    const bool along_n = page.stride_Bn == 1 && n % 2 == 0 && inside[0] && inside[1] && paired(page.stride_Br);
    Up<A> up{};
#pragma unroll
    for (int j = 0; j < 4; j += 2) {
        const int r = 2 * t + 4 * j;
        if (along_r && r + 1 < ranks) {
#pragma unroll
            for (int i = 0; i < 2; ++i)
                if (inside[i]) {
                    const auto pair = *reinterpret_cast<const Pair<A>*>(B + i * page.stride_Bn + r);
                    up.value[i][j] = pair.value[0], up.value[i][j + 1] = pair.value[1];
                }
        } else {
#pragma unroll
            for (int q = 0; q < 2; ++q) {
                if (r + q >= ranks) break;
                if (along_n) {
                    const auto pair = *reinterpret_cast<const Pair<A>*>(B + (r + q) * page.stride_Br);
                    up.value[0][j + q] = pair.value[0], up.value[1][j + q] = pair.value[1];
                } else {
#pragma unroll
                    for (int i = 0; i < 2; ++i)
                        if (inside[i]) up.value[i][j + q] = B[i * page.stride_Bn + (r + q) * page.stride_Br];
                }
            }
        }
    }
    return up;
}

// Stores pages first … first + kPages - 1 of s · act(z) of all rows, as terms. Ranks that a row does not have are 0.
template <int kTiles>
__device__ inline void store_v(const LoraLinearArgs& args, const Rows<8 * kTiles>& rows, int z_page, int first,
                               Shared<kTiles>& shared) {
    for (int i = threadIdx.x; i < 8 * kTiles * kPages * 8; i += kThreads) {
        const int place = i / (kPages * 8), word = i % (kPages * 8), r = first * kPage + 2 * word;
        const int segment = place < args.M ? rows.segment[place] : -1;
        float v[2] = {0.0f, 0.0f};
        if (segment >= 0) {
            const Adapter& adapter = rows.segments[segment].adapter;
            const float* z = args.z + (int64_t(rows.row[place]) * args.adapters.z_pages + z_page) * kPage + r;
#pragma unroll
            for (int q = 0; q < 2; ++q)
                if (r + q < adapter.rank) v[q] = adapter.scaling * activate(adapter.activation, z[q]);
        }
        uint32_t terms[kTermsOfV];
        split_terms(v[0], v[1], terms);
#pragma unroll
        for (int term = 0; term < kTermsOfV; ++term) shared.v[term][place][word] = terms[term];
    }
}

// Iterates over the pages of all segments, limited to pages first … first + kPages - 1 of each adapter.
struct Cursor {
    int segment, page;

    template <int kRows>
    __device__ void skip_finished(const Rows<kRows>& rows, int first) {
        while (segment < rows.segment_count &&
               page >= min(first + kPages, (rows.segments[segment].adapter.rank + kPage - 1) / kPage)) {
            ++segment;
            page = first;
        }
    }
};

// sum += v Bᵀ over one page of one segment, only in the segment's rows, so that inf or NaN does not reach other rows.
template <typename A, int kTiles>
__device__ inline void multiply_up(const Up<A>& up, const Segment& segment, int word, const bool (&inside)[2],
                                   const Shared<kTiles>& shared, float (&sum)[kTiles][4]) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    uint32_t a[4][kTerms<A>];
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i) split_terms(widen(up.value[i][2 * j]), widen(up.value[i][2 * j + 1]), a[2 * j + i]);
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
        if (segment.from >= 8 * j + 8 || segment.to <= 8 * j) continue;
        float part[4] = {};
#pragma unroll
        for (int q = kTermsOfV - 1; q >= 0; --q) {  // the small terms first
            const uint32_t* v = &shared.v[q][8 * j + g][word + t];
            const uint32_t b[2] = {v[0], v[4]};
#pragma unroll
            for (int p = kTerms<A> - 1; p >= 0; --p) {
                const uint32_t term[4] = {a[0][p], a[1][p], a[2][p], a[3][p]};
                multiply_bf16(part, term, b);
            }
        }
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            const int place = 8 * j + 2 * t + c % 2;
            if (inside[c / 2] && place >= segment.from && place < segment.to) sum[j][c] += part[c];
        }
    }
}

// sum += s · act(z) B_iᵀ + β_i of one slice. n: this thread's first column of y.
template <typename A, int kTiles>
__device__ inline void add_adapters(const LoraLinearArgs& args, const LoraLinearPlan& plan, const Slice& slice, int n,
                                    const Rows<8 * kTiles>& rows, Shared<kTiles>& shared, bool& waited,
                                    float (&sum)[kTiles][4]) {
    const bool inside[2] = {n >= slice.from && n < slice.to, n + 1 >= slice.from && n + 1 < slice.to};
    for (int first = 0; first < slice.end_page - slice.first_page; first += kPages) {
        Cursor next = {0, first};
        next.skip_finished(rows, first);
        if (next.segment == rows.segment_count) break;  // no adapter has that many ranks
        for (bool begins = true; next.segment < rows.segment_count; begins = false) {
            // The loads of a batch are in flight together, and those of the first batch do not wait for z.
            Up<A> up[kInFlight];
            Cursor at[kInFlight];
#pragma unroll
            for (int i = 0; i < kInFlight; ++i) {
                at[i] = next;
                if (next.segment == rows.segment_count) continue;
                const Adapter& adapter = rows.segments[next.segment].adapter;
                const Page page = page_at(args.adapters, adapter.first_page + next.page);
                up[i] = load_up<A>(page, adapter.rank - next.page * kPage, n - slice.from, inside);
                ++next.page;
                next.skip_finished(rows, first);
            }
            if (begins) {
                // After either barrier, no thread reads the ring or the previous pages any more.
                if (waited) {
                    __syncthreads();
                } else {
                    tickets::wait_for(args.counters, plan.z_tiles);
                    waited = true;
                }
                store_v(args, rows, slice.first_page, first, shared);
                __syncthreads();
            }
#pragma unroll
            for (int i = 0; i < kInFlight; ++i) {
                if (at[i].segment == rows.segment_count) break;
                multiply_up(up[i], rows.segments[at[i].segment], (at[i].page - first) * 8, inside, shared, sum);
            }
        }
    }
    for (int first = 0; first < rows.segment_count; first += kInFlight) {
        float beta[kInFlight][2] = {};
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) {
            if (first + i >= rows.segment_count) break;
            const A* from = reinterpret_cast<const A*>(rows.segments[first + i].adapter.bias_B);
#pragma unroll
            for (int q = 0; q < 2; ++q)
                if (from && inside[q]) beta[i][q] = widen(from[n - slice.from + q]);
        }
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) {
            if (first + i >= rows.segment_count) break;
            const Segment& segment = rows.segments[first + i];
#pragma unroll
            for (int j = 0; j < kTiles; ++j)
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                    const int place = 8 * j + 2 * int(threadIdx.x % 4) + c % 2;
                    if (place >= segment.from && place < segment.to) sum[j][c] += beta[i][c / 2];
                }
        }
    }
}

__device__ inline float load_bias(const LoraLinearArgs& args, int n) {
    if (!args.bias || n >= args.N) return 0.0f;
    switch (args.bias_dtype) {
        case Dtype::kFloat32: return static_cast<const float*>(args.bias)[n];
        case Dtype::kBFloat16: return widen(static_cast<const __nv_bfloat16*>(args.bias)[n]);
        default: return widen(static_cast<const __half*>(args.bias)[n]);
    }
}

// Rounds once and stores y. n: this thread's first column.
template <typename T, int kTiles>
__device__ inline void store_y(const LoraLinearArgs& args, const Rows<8 * kTiles>& rows, int n,
                               const float (&sum)[kTiles][4]) {
    const float bias[2] = {load_bias(args, n), load_bias(args, n + 1)};
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
#pragma unroll
        for (int q = 0; q < 2; ++q) {
            const int place = 8 * j + 2 * int(threadIdx.x % 4) + q;
            if (place >= args.M || n >= args.N) continue;
            T* y = static_cast<T*>(args.y) + int64_t(rows.row[place]) * args.N + n;
            const Pair<T> pair = {Storage<T>::round(sum[j][q] + bias[0]), Storage<T>::round(sum[j][2 + q] + bias[1])};
            if (args.N % 2 == 0) {
                *reinterpret_cast<Pair<T>*>(y) = pair;
            } else {
                y[0] = pair.value[0];
                if (n + 1 < args.N) y[1] = pair.value[1];
            }
        }
}

template <typename T, typename A, int kTiles>
__device__ inline void tile(const LoraLinearArgs& args, const LoraLinearPlan& plan, int number, Rows<8 * kTiles>& rows,
                            Shared<kTiles>& shared, int& broadcast) {
    const int splits = plan.expand_splits, split = number % splits, tile_index = number / splits;
    const int first_n = tile_index * kColumns;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int n = first_n + warp * 16 + lane / 4 * 2;
    const Range range = range_of(split, splits, args.K, kStep);
    const int steps = (range.to - range.from + kStep - 1) / kStep;

    const int copied_row = threadIdx.x / kChunks, chunk = threadIdx.x % kChunks;
    // Rows kRowStep apart have the same permutation.
    const int in_weight = chunk ^ copied_row / 2 % 8, in_x = chunk ^ copied_row % 8;

    // W's copies need not wait for the sort. Its first copies all belong to the first group, x's each to its own.
    const auto weight = source_of_weight<T>(args, first_n);
#pragma unroll
    for (int s = 0; s < kStages - 1; ++s)
        if (s < steps) copy(weight, range.from + s * kStep, range.to, in_weight, shared.ring[s].weight);
    sort_rows(args, rows);
    const auto x = source_of_x<T, kTiles>(args, rows);
#pragma unroll
    for (int s = 0; s < kStages - 1; ++s) {
        if (s < steps) copy(x, range.from + s * kStep, range.to, in_x, shared.ring[s].x);
        copy_async_commit();
    }
    find_segments(args, rows);

    float sum[kTiles][4] = {};
    for (int step = 0; step < steps; ++step) {
        copy_async_wait<kStages - 2>();
        __syncthreads();  // all copies of this stage are complete, and no thread reads the previous stage
        const int ahead = step + kStages - 1;
        if (ahead < steps) {
            Stage<kTiles>& stage = shared.ring[ahead % kStages];
            copy(weight, range.from + ahead * kStep, range.to, in_weight, stage.weight);
            copy(x, range.from + ahead * kStep, range.to, in_x, stage.x);
        }
        copy_async_commit();
        multiply_stage<T>(shared.ring[step % kStages], sum);
    }

    if (splits > 1) {
        // Parts are stored as threads hold them, four sums in a float4. The last block to arrive adds them in order.
        float4* parts = reinterpret_cast<float4*>(args.partials) + plan.expand_parts / 4;
        parts += int64_t(tile_index) * splits * kTiles * kThreads + threadIdx.x;
#pragma unroll
        for (int j = 0; j < kTiles; ++j)
            parts[(split * kTiles + j) * kThreads] = {sum[j][0], sum[j][1], sum[j][2], sum[j][3]};
        int* arrivals = args.counters + tickets::kArrivals + plan.z_tiles + tile_index;
        if (!tickets::arrive_last(arrivals, splits, broadcast)) return;
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
            float4 total = parts[j * kThreads];
            for (int other = 1; other < splits; ++other) {
                const float4 part = parts[(other * kTiles + j) * kThreads];
                total.x += part.x, total.y += part.y, total.z += part.z, total.w += part.w;
            }
            sum[j][0] = total.x, sum[j][1] = total.y, sum[j][2] = total.z, sum[j][3] = total.w;
        }
    }

    bool waited = false;
    for (int s = 0; rows.segment_count && s < max(args.adapters.slice_count, 1); ++s) {
        const Slice slice = slice_at(args.adapters, s, args.N);
        if (slice.to <= first_n || slice.from >= first_n + kColumns) continue;
        __syncthreads();  // no thread reads the adapters of the previous slice
        find_adapters(args, slice, rows);
        add_adapters<A>(args, plan, slice, n, rows, shared, waited, sum);
    }
    store_y<T>(args, rows, n, sum);
}

}  // namespace peftk::cuda::expand
