// Sorts rows by adapter, and finds where each adapter's rows start (docs/segments.md).
//
// Up to kTile rows take one launch of one block. More rows take three launches over tiles, a counting sort:
//
//     sort     a tile sorts its rows; running[tile, g] = how many of them have a group up to g
//     scan     each column of `running` is summed over the tiles
//     scatter  the row of group g at place p of its sorted tile t goes to place
//                  p + (rows of lower groups in other tiles) + (rows of group g in earlier tiles)
//                = p + running[last, g - 1] - running[t, g - 1] + running[t - 1, g]
//
// Group g = id + 1, so that the base layer's rows are group 0. A row's key is g · kTile + its place in the tile. All
// keys differ, so any sort is stable. No block waits for another, and no word is written by two threads, so the result
// does not depend on the schedule.

#include "cuda/segments.h"

#include <algorithm>
#include <climits>

#include "cuda/instructions.cuh"

namespace peftk::cuda {
namespace {

constexpr int kTile = 1024;                 // rows that a block sorts at most
constexpr int kMostAdapters = 1 << 20;      // so that a key fits into an int
constexpr int kMostRows = INT_MAX - kTile;  // so that any place of a tile fits into an int
constexpr int kRowsPerEntry = 16;           // of `blocks`
constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr unsigned kWholeWarp = 0xffffffff;
constexpr int kGroups = 256;      // groups that a block counts at least: more if kMostBlocks would not be enough
constexpr int kMostBlocks = 256;  // that count groups
constexpr int kStrips = 16;       // ranges of tiles that a block of the scan sums in parallel, one per warp
constexpr int kBatch = 4;         // tiles of a strip whose counts are in flight together

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How kSize keys are distributed over the threads: thread t holds the places kKeys · t … kKeys · t + kKeys - 1. Up to
// 256 keys are sorted by a single warp, which needs no barrier.
template <int kSize>
struct Sort {
    static constexpr int kKeys = kSize <= 64 ? 2 : 8;  // of a thread
    static constexpr int kSorters = kSize / kKeys;     // threads
};

// The index of a place's key in shared memory. One word after every 32 is left free, so that a warp's stores, kKeys
// places apart, have no bank conflicts. Neither have loads of 32 consecutive places.
__host__ __device__ constexpr int slot(int place) { return place + place / 32; }

template <int kSize>
struct Keys {
    int exchange[2][kSize];  // between warps that sort
    int sorted[slot(kSize)];
    int totals[kWarps];
};

// ---- The sort: a bitonic network. Runs of `run` places, every other one descending, are merged from runs of half the
// size: each place is compared with the one `stride` away, for stride = run / 2 … 1, and keeps the smaller or larger
// key. Loops are unrolled only where they index registers, since code that runs once must be fetched from memory.

// The last strides of a run, from `longest` on, for which both places belong to this thread.
template <int kKeys>
__device__ inline void merge_own(int (&key)[kKeys], int place, int run, int longest) {
#pragma unroll
    for (int stride = kKeys / 2; stride > 0; stride /= 2) {
        if (stride > longest) continue;
#pragma unroll
        for (int j = 0; j < kKeys; ++j) {
            if (j & stride) continue;
            const bool ascending = ((place + j) & run) == 0;
            const int less = min(key[j], key[j + stride]), more = max(key[j], key[j + stride]);
            key[j] = ascending ? less : more;
            key[j + stride] = ascending ? more : less;
        }
    }
}

template <int kKeys>
__device__ inline void keep_smaller_or_larger(int (&key)[kKeys], const int (&other)[kKeys], bool smaller) {
#pragma unroll
    for (int j = 0; j < kKeys; ++j) key[j] = smaller ? min(key[j], other[j]) : max(key[j], other[j]);
}

// Called by the first kSorters threads of the block: all of them, or one warp.
template <int kSize>
__device__ inline void sort(int (&key)[Sort<kSize>::kKeys], int (&exchange)[2][kSize]) {
    constexpr int kKeys = Sort<kSize>::kKeys, kSorters = Sort<kSize>::kSorters;
    const int thread = threadIdx.x, place = thread * kKeys;
#pragma unroll
    for (int run = 2; run <= kKeys; run *= 2) merge_own(key, place, run, run / 2);

    int buffer = 0;
#pragma unroll 1
    for (int run = 2 * kKeys; run <= kSize; run *= 2) {
        const bool ascending = (place & run) == 0;
        int other[kKeys];
        int distance = run / 2 / kKeys;  // the stride, in threads
        if constexpr (kSorters > 32) {
            // One barrier per step is enough: the buffers alternate, and a thread that stores to one again has passed a
            // barrier that all threads reached after loading from it.
#pragma unroll 1
            for (; distance >= 32; distance /= 2) {
#pragma unroll
                for (int j = 0; j < kKeys; ++j) exchange[buffer][j * kSorters + thread] = key[j];
                __syncthreads();
#pragma unroll
                for (int j = 0; j < kKeys; ++j) other[j] = exchange[buffer][j * kSorters + (thread ^ distance)];
                keep_smaller_or_larger(key, other, ((thread & distance) == 0) == ascending);
                buffer ^= 1;
            }
        }
#pragma unroll 1
        for (; distance > 0; distance /= 2) {
#pragma unroll
            for (int j = 0; j < kKeys; ++j) other[j] = __shfl_xor_sync(kWholeWarp, key[j], distance);
            keep_smaller_or_larger(key, other, ((thread & distance) == 0) == ascending);
        }
        merge_own(key, place, run, kKeys / 2);
    }
}

// Stores the keys of a tile's rows in shared.sorted, ascending; places without a row are last. Every thread may read
// them afterwards.
template <typename Id, int kSize>
__device__ inline void sort_rows(const SegmentsArgs& args, int tile, Keys<kSize>& shared) {
    constexpr int kKeys = Sort<kSize>::kKeys, kSorters = Sort<kSize>::kSorters;
    const int thread = threadIdx.x;
    if (thread < kSorters) {
        int key[kKeys];
#pragma unroll
        for (int j = 0; j < kKeys; ++j) {
            // Neighbouring threads load neighbouring rows: for the network it does not matter where a key starts.
            const int at = j * kSorters + thread;
            const int64_t row = int64_t(tile) * kTile + at;
            key[j] = INT_MAX;
            if (row < args.M) {
                // Compared before narrowing: an int64 might wrap to a valid id.
                const Id id = static_cast<const Id*>(args.ids)[row * args.stride];
                const int group = id >= 0 && id < args.adapters ? int(id) + 1 : 0;
                key[j] = group * kTile + at;
            }
        }
        sort<kSize>(key, shared.exchange);
#pragma unroll
        for (int j = 0; j < kKeys; ++j) shared.sorted[slot(thread * kKeys + j)] = key[j];
    }
    __syncthreads();
}

// ---- Counting

// The number of sorted keys below a limit: a binary search with the same steps in every thread.
template <int kSize>
__device__ inline int count_below(const int (&sorted)[slot(kSize)], int limit) {
    int count = 0;
#pragma unroll
    for (int step = kSize / 2; step > 0; step /= 2)
        if (sorted[slot(count + step - 1)] < limit) count += step;
    return count + (sorted[slot(count)] < limit);
}

// counts[g] = how many rows have a group up to g, for this block's share of the groups 0 … adapters.
template <int kSize>
__device__ inline void store_counts(const int (&sorted)[slot(kSize)], int* counts, int adapters) {
    const int blocks = gridDim.y;
    for (int g = blockIdx.y * kThreads + threadIdx.x; g <= adapters; g += blocks * kThreads)
        counts[g] = count_below<kSize>(sorted, (g + 1) * kTile);
}

// A warp processes kRounds · 32 neighbouring places, 32 in each round. Returns the thread's place in a round.
template <int kRounds>
__device__ inline int neighbour(int round) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    return (warp * kRounds + round) * 32 + lane;
}

// upto[i] = how many flags are set at places up to and including neighbour(i). Returns the number of flags of the
// block. `totals` may be written again after the next barrier.
template <int kRounds>
__device__ inline int count_flags(const bool (&flag)[kRounds], int (&upto)[kRounds], int (&totals)[kWarps]) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const unsigned not_after = (2u << lane) - 1;  // lanes up to this one; 2u << 31 is 0
    int count = 0;
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
        const unsigned set = __ballot_sync(kWholeWarp, flag[i]);
        upto[i] = count + __popc(set & not_after);
        count += __popc(set);
    }
    if (lane == 0) totals[warp] = count;
    __syncthreads();
    int before = 0, all = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
        before += w < warp ? totals[w] : 0;
        all += totals[w];
    }
#pragma unroll
    for (int i = 0; i < kRounds; ++i) upto[i] += before;
    return all;
}

// ---- Tables

// Stores the entries of a row at its place, and those of the segment for its first row (head).
__device__ inline void store_row(const SegmentsArgs& args, int place, int row, int group, int segment, bool head) {
    args.order[place] = row;
    args.sorted_ids[place] = group - 1;
    if (place % kRowsPerEntry == 0) args.blocks[place / kRowsPerEntry] = segment;
    if (head) {
        args.starts[segment] = place;
        args.owners[segment] = group - 1;
    }
}

// Stores the entries after the last segment, from `first` to `last`.
__device__ inline void store_beyond(const SegmentsArgs& args, int first, int last) {
    last = min(last, int(min(args.M, args.adapters + 1)));
    for (int segment = first + int(threadIdx.x); segment <= last; segment += kThreads) {
        args.starts[segment] = int(args.M);
        args.owners[segment] = -1;
    }
}

// ---- Kernels

// Computes everything for up to kSize rows. With many adapters, several blocks sort the same keys and share the ends.
template <typename Id, int kSize>
__global__ void __launch_bounds__(kThreads) segments_kernel(SegmentsArgs args) {
    constexpr int kRounds = kSize < kThreads ? 1 : kSize / kThreads;
    auto& shared = shared_memory<Keys<kSize>>();
    const int M = int(args.M);
    sort_rows<Id, kSize>(args, 0, shared);
    store_counts<kSize>(shared.sorted, args.ends, int(args.adapters));
    if (blockIdx.y > 0) return;

    int segment[kRounds];  // 1 + its number
    bool head[kRounds];
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
        const int place = neighbour<kRounds>(i);
        head[i] =
            place < M && (place == 0 || shared.sorted[slot(place)] / kTile != shared.sorted[slot(place - 1)] / kTile);
    }
    const int found = count_flags<kRounds>(head, segment, shared.totals);
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
        const int place = neighbour<kRounds>(i);
        if (place >= M) break;
        const int key = shared.sorted[slot(place)];
        store_row(args, place, key % kTile, key / kTile, segment[i] - 1, head[i]);
    }
    store_beyond(args, found, M);
}

// The two arrays in the workspace that the launches for more rows share.
struct Tiles {
    int64_t count, columns;
    int* keys;     // [count, kTile]: the keys of each tile, ascending
    int* running;  // [count, columns]: rows with a group up to the column's, in the tile; after the scan, up to it

    explicit Tiles(const SegmentsArgs& args)
        : count(ceil_div(args.M, kTile)),
          columns(args.adapters + 1),
          keys(args.workspace),
          running(args.workspace + count * kTile) {}
};

template <typename Id>
__global__ void __launch_bounds__(kThreads) sort_kernel(SegmentsArgs args, Tiles tiles) {
    auto& shared = shared_memory<Keys<kTile>>();
    const int tile = blockIdx.x;
    sort_rows<Id, kTile>(args, tile, shared);
    store_counts<kTile>(shared.sorted, tiles.running + tile * tiles.columns, int(args.adapters));
    if (blockIdx.y > 0) return;
    for (int at = threadIdx.x; at < kTile; at += kThreads)
        tiles.keys[int64_t(tile) * kTile + at] = shared.sorted[slot(at)];
}

// A lane has a column, a warp a strip of the tiles. Strips are summed first, then read again with the sum of the strips
// before them. The last tile's sums are the ends.
struct Strips {
    int total[kStrips][32];
};

__global__ void __launch_bounds__(kStrips * 32) scan_kernel(SegmentsArgs args, Tiles tiles) {
    auto& shared = shared_memory<Strips>();
    const int strip = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int64_t g = int64_t(blockIdx.x) * 32 + lane;
    const int64_t height = ceil_div(tiles.count, kStrips);
    const int64_t first = strip * height, last = g < tiles.columns ? min(first + height, tiles.count) : 0;
    int* column = tiles.running + g;

    int total = 0;
#pragma unroll 4
    for (int64_t t = first; t < last; ++t) total += column[t * tiles.columns];
    shared.total[strip][lane] = total;
    __syncthreads();
    int sum = 0;
    for (int s = 0; s < strip; ++s) sum += shared.total[s][lane];
    // All of a batch is loaded before any of it is stored, since the compiler may not move a load over a store.
    for (int64_t t = first; t < last; t += kBatch) {
        int count[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) count[i] = t + i < last ? column[(t + i) * tiles.columns] : 0;
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            sum += count[i];
            if (t + i < last) column[(t + i) * tiles.columns] = sum;
        }
    }
    if (strip == kStrips - 1 && g < tiles.columns) args.ends[g] = sum;
}

// The numbers of the segments of kTile groups.
struct Numbers {
    int upto[kTile];
    int totals[kWarps];
};

__global__ void __launch_bounds__(kThreads) scatter_kernel(SegmentsArgs args, Tiles tiles) {
    constexpr int kRounds = kTile / kThreads;
    auto& shared = shared_memory<Numbers>();
    const int tile = blockIdx.x, adapters = int(args.adapters);
    const int first = tile * kTile, rows = min(int(args.M) - first, kTile);
    const int* mine = tiles.running + tile * tiles.columns;
    const int* before = mine - tiles.columns;  // the tile before

    int group[kRounds], row[kRounds], place[kRounds], segment[kRounds];
    bool head[kRounds];
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
        const int at = neighbour<kRounds>(i);
        const int key = at < rows ? tiles.keys[int64_t(first) + at] : -kTile;
        const bool lower = key >= kTile;
        group[i] = key / kTile;  // -1: no row
        row[i] = first + key % kTile;
        const int start = lower ? args.ends[group[i] - 1] : 0;
        place[i] = at + start - (lower ? mine[group[i] - 1] : 0) + (tile > 0 && at < rows ? before[group[i]] : 0);
        head[i] = place[i] == start;
    }

    // The number of a row's segment is how many groups below its own have rows, counted in chunks of kTile groups.
    int found = 0;
    for (int chunk = 0; chunk <= adapters; chunk += kTile) {
        bool has_rows[kRounds];
        int upto[kRounds];
#pragma unroll
        for (int i = 0; i < kRounds; ++i) {
            const int g = chunk + neighbour<kRounds>(i);
            has_rows[i] = g <= adapters && args.ends[g] > (g > 0 ? args.ends[g - 1] : 0);
        }
        const int here = count_flags<kRounds>(has_rows, upto, shared.totals);
#pragma unroll
        for (int i = 0; i < kRounds; ++i) shared.upto[neighbour<kRounds>(i)] = found + upto[i];
        __syncthreads();
        // The next chunk's numbers are stored after the barrier in its count_flags, which no thread passes before all
        // have read these.
#pragma unroll
        for (int i = 0; i < kRounds; ++i)
            if (group[i] >= chunk && group[i] - chunk < kTile) segment[i] = shared.upto[group[i] - chunk] - 1;
        found += here;
    }
#pragma unroll
    for (int i = 0; i < kRounds; ++i)
        if (group[i] >= 0) store_row(args, place[i], row[i], group[i], segment[i], head[i]);
    store_beyond(args, max(found, first + 1), first + kTile);  // each entry is written by one tile
}

// ---- Launches

template <typename Shared, typename... Parameters>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, int threads, cudaStream_t stream,
                   const Parameters&... arguments) {
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3(unsigned(threads));
    config.dynamicSmemBytes = sizeof(Shared);
    config.stream = stream;
    return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// Calls `body` with the smallest number of keys for which M rows fit into one block, as a constant.
template <typename Body>
auto with_size(int64_t M, Body body) {
    if (M <= 64) return body(std::integral_constant<int, 64>{});
    if (M <= 256) return body(std::integral_constant<int, 256>{});
    return body(std::integral_constant<int, kTile>{});
}

template <typename Id>
cudaError_t for_ids(const SegmentsArgs& args, cudaStream_t stream) {
    const Tiles tiles(args);
    const int64_t columns = tiles.columns, count = std::max<int64_t>(tiles.count, 1);
    const int64_t shares = std::min(ceil_div(columns, kGroups), std::max<int64_t>(kMostBlocks / count, 1));
    const dim3 grid = {unsigned(count), unsigned(shares)};
    if (args.M <= kTile)
        return with_size(args.M, [&](auto size) {
            constexpr int kSize = decltype(size)::value;
            return launch<Keys<kSize>>(segments_kernel<Id, kSize>, grid, kThreads, stream, args);
        });

    cudaError_t error = launch<Keys<kTile>>(sort_kernel<Id>, grid, kThreads, stream, args, tiles);
    if (error != cudaSuccess) return error;
    error = launch<Strips>(scan_kernel, dim3(unsigned(ceil_div(columns, 32))), kStrips * 32, stream, args, tiles);
    if (error != cudaSuccess) return error;
    return launch<Numbers>(scatter_kernel, dim3(unsigned(count)), kThreads, stream, args, tiles);
}

}  // namespace

int64_t segments_workspace(int64_t M, int64_t adapters) {
    return M <= kTile ? 0 : ceil_div(M, kTile) * (kTile + adapters + 1);
}

int64_t segments_shared(int64_t M) {
    const int64_t keys = with_size(M, [](auto size) { return int64_t(sizeof(Keys<decltype(size)::value>)); });
    return M <= kTile ? keys : std::max<int64_t>({keys, sizeof(Strips), sizeof(Numbers)});
}

Status segments(const SegmentsArgs& args, int device, cudaStream_t stream) {
    if (args.adapters > kMostAdapters) return Unsupported::kAdapters;
    if (args.M > kMostRows) return Unsupported::kRows;
    const DeviceGuard guard(device);
    if (guard.status() != cudaSuccess) return guard.status();
    return args.wide ? for_ids<int64_t>(args, stream) : for_ids<int32_t>(args, stream);
}

}  // namespace peftk::cuda
