// Merge and unmerge of a list of layers on a CUDA device, in place: each launcher makes one launch for the whole list.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/dtype.h"
#include "cuda/status.h"

namespace peftk::cuda {

// A layer: a row of the table in device memory, with the FIELDS of peftk/launch/merge_layers.py in their order. W is
// divided into tiles, numbered row by row. Tiles, rows and weights are numbered consecutively over all layers.
struct MergeLayer {
    void* weight;    // [N, K], contiguous rows
    int64_t stride;  // elements from row to row
    int64_t N, K;
    int8_t* code;        // [N, K], dense
    const void* lora_A;  // [R, K], dense: all adapters of the layer, side by side
    const void* lora_B;  // [N, R], dense
    int64_t R;           // ranks of all of the layer's adapters
    // indices into `ends` and `scaling`
    int64_t first_adapter, end_adapter;
    int64_t tiles_across;
    // number of tiles, rows and weights of the layers before it
    int64_t first_tile, first_row, first_weight;
    // 1 if W's rows start at multiples of 16 bytes, and the code's rows at multiples of 16 / sizeof(W's dtype) bytes
    int64_t aligned;
};
static_assert(sizeof(MergeLayer) == 15 * sizeof(int64_t), "the table's rows have 15 fields of 64 bits");

// The layers of a call. All pointers are device pointers.
struct MergeList {
    const MergeLayer* table;  // [layers]
    const int32_t* ends;      // [adapters of all layers]: the rank after the adapter's last, within its layer
    const float* scaling;     // [adapters of all layers]
    int32_t layers;
    int64_t tiles;  // of all layers, of merge_tile's size
    Dtype weight_dtype, adapter_dtype;
};

// What a merge records in addition to W' and the code.
struct MergeNotes {
    int8_t* merged;      // [tiles]: 1 for merged tiles, which are skipped
    uint32_t* row_sums;  // [rows of all layers]: the checksum's row sums, to which the tiles' shares are added
    int32_t* refused;    // [layers]: set to 1 if W' would not be finite
    int32_t* raw_count;
    int64_t* raw_keys;  // [room]: number of each raw weight, over all layers; in any order
    void* raw_values;   // [room]: its value in W
    int32_t room;
};

struct MergeTile {
    int rows, columns;
    int shared;  // bytes of shared memory per block
};
MergeTile merge_tile(Dtype weight_dtype);

// Merges every tile that is not merged. A tile is unchanged if its W' would not be finite, or if there is no room left
// for its raw weights; raw_count then says how much room all of them need.
Status merge(const MergeList& list, const MergeNotes& notes, int device, cudaStream_t stream);

// Unmerges every merged tile. Raw weights become W″ until restore() writes their values.
Status unmerge(const MergeList& list, const int8_t* merged, int device, cudaStream_t stream);

// Writes raw weights back to W. Keys below 0 are skipped.
Status restore(const MergeList& list, const int64_t* raw_keys, const void* raw_values, int64_t count, int device,
               cudaStream_t stream);

// Adds each weight to its row's sum in the checksum.
Status sum_rows(const MergeList& list, uint32_t* row_sums, int device, cudaStream_t stream);

}  // namespace peftk::cuda
