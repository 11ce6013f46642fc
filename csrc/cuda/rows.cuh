// The rows of a call in the order of their adapters, found by every block for itself: 64 ids are sorted faster than a
// second launch starts.
#pragma once

#include "cuda/adapters.cuh"
#include "cuda/instructions.cuh"

namespace peftk::cuda {

// Places from `from` to `to` - 1 of the order have the same adapter. Base-only rows, which come first, are in no
// segment.
struct Segment {
    int from, to;
    Adapter adapter;
};

template <int kRows>
struct Rows {
    int id[kRows];       // of the row at each place, ascending; -1: base only
    int row[kRows];      // which row that is
    int segment[kRows];  // which segment the place is in, or -1
    Segment segments[kRows];
    int segment_count;
    int unsorted[kRows];
};

// A stable sort by counting: a row's place is how many come before it.
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

// After sort_rows: the segments, without their adapters. They are there after the next barrier.
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

// The adapters of all segments in one slice of y's columns. The caller sees to it that nobody still reads the last
// ones.
template <int kRows>
__device__ inline void find_adapters(const LoraLinearArgs& args, const Slice& slice, Rows<kRows>& rows) {
    const int segment = threadIdx.x;
    if (segment < rows.segment_count) {
        const int id = rows.id[rows.segments[segment].from];
        rows.segments[segment].adapter = adapter_at(args.adapters, slice.first_entry + id);
    }
    __syncthreads();
}

// Range `part` of `parts` of K, in whole steps.
struct Range {
    int from, to;
};

__device__ inline Range range_of(int part, int parts, int K, int step) {
    const int steps = (K + step - 1) / step, each = (steps + parts - 1) / parts * step;
    const int from = min(part * each, K);
    return {from, min(from + each, K)};
}

}  // namespace peftk::cuda
