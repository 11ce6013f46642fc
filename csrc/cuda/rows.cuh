// The rows of a call in the order of their adapters. Every block sorts them again, since sorting 64 ids takes less time
// than starting a second launch.
#pragma once

#include "cuda/adapters.cuh"
#include "cuda/instructions.cuh"

namespace peftk::cuda {

// The places `from` … `to` - 1 of the order, which have the same adapter. Base-only rows come first and are in no
// segment.
struct Segment {
    int from, to;
    Adapter adapter;
};

template <int kRows>
struct Rows {
    int id[kRows];       // id of the row at each place, ascending; -1: base only
    int row[kRows];      // index of that row
    int segment[kRows];  // segment of the place, or -1
    Segment segments[kRows];
    int segment_count;
    int unsorted[kRows];
};

// A stable counting sort: a row's place is the number of rows before it.
template <int kRows>
__device__ inline void sort_rows(const LoraLinearArgs& args, Rows<kRows>& rows) {
    const int thread = threadIdx.x;
    int id = -1;
    if (thread < args.M) {
        id = args.ids ? args.ids[thread] : 0;
        if (id < 0 || id >= args.adapters.count) id = -1;
        rows.unsorted[thread] = id;
    }
    __syncthreads();
    if (thread < args.M) {
        int place = 0;
        for (int other = 0; other < args.M; ++other) {
            const int its = rows.unsorted[other];
            place += its < id || (its == id && other < thread);
        }
        rows.id[place] = id;
        rows.row[place] = thread;
    }
    __syncthreads();
}

// Finds the segments, without their adapters, after sort_rows. They may be read after the next barrier.
template <int kRows>
__device__ inline void find_segments(const LoraLinearArgs& args, Rows<kRows>& rows) {
    const int place = threadIdx.x;
    if (place < args.M) {
        const int id = rows.id[place];
        int segment = -1;  // the last one that begins at this place or before it
        for (int p = 0; p <= place; ++p) segment += rows.id[p] >= 0 && (p == 0 || rows.id[p] != rows.id[p - 1]);
        rows.segment[place] = segment;  // -1 for base-only rows, since these come first
        if (id >= 0 && (place == 0 || rows.id[place - 1] != id)) {
            int to = place + 1;
            while (to < args.M && rows.id[to] == id) ++to;
            rows.segments[segment].from = place;
            rows.segments[segment].to = to;
        }
        if (place == args.M - 1) rows.segment_count = segment + 1;
    }
}

// Loads the adapters of all segments in one slice of y's columns. The caller must make sure that no thread still reads
// those of the previous slice.
template <int kRows>
__device__ inline void find_adapters(const LoraLinearArgs& args, const Slice& slice, Rows<kRows>& rows) {
    const int segment = threadIdx.x;
    if (segment < rows.segment_count) {
        const int id = rows.id[rows.segments[segment].from];
        rows.segments[segment].adapter = adapter_at(args.adapters, slice.first_entry + id);
    }
    __syncthreads();
}

// Range `part` of the `parts` ranges of K, in whole steps.
struct Range {
    int from, to;
};

__device__ inline Range range_of(int part, int parts, int K, int step) {
    const int steps = (K + step - 1) / step, each = (steps + parts - 1) / parts * step;
    const int from = min(part * each, K);
    return {from, min(from + each, K)};
}

}  // namespace peftk::cuda
