// Merge and unmerge of a list of layers on a CUDA device, in place: each launcher makes one launch for the whole list.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/dtype.h"
#include "cuda/status.h"

namespace peftk::cuda {

// A layer, a row of the table in device memory: the FIELDS of peftk/launch/merge_layers.py, in their order. Its
// weights are cut into tiles, row by row of tiles; tiles, rows and weights are counted through all layers of the list.
struct MergeLayer {
    void* weight;    // [N, K], contiguous rows
    int64_t stride;  // elements from row to row
    int64_t N, K;
    int8_t* code;        // [N, K], dense
    const void* lora_A;  // [R, K], dense: of all adapters of the layer, side by side
    const void* lora_B;  // [N, R], dense
    int64_t R;           // of the layer's adapters together
    // in `ends` and `scaling`
    int64_t first_adapter, end_adapter;
    int64_t tiles_across;
    // how many tiles, rows and weights the layers before it have
    int64_t first_tile, first_row, first_weight;
    // 1 where W's rows start on 16 bytes, and those of the code on as many bytes as these have elements
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

// What a merge notes beside W' and the code.
struct MergeNotes {
    int8_t* merged;      // [tiles]: 1 for the tiles that are merged; these are left alone
    uint32_t* row_sums;  // [rows of all layers]: the checksum's, to which the tiles' shares are added
    int32_t* refused;    // [layers]: 1 where W' would not be finite
    int32_t* raw_count;
    int64_t* raw_keys;  // [room]: of which weight, counted through all layers; in any order
    void* raw_values;   // [room]: W
    int32_t room;
};

struct MergeTile {
    int rows, columns;
    int shared;  // bytes of a block
};
MergeTile merge_tile(Dtype weight_dtype);

// Merges every tile that is not merged. A tile stays as it is where its W' would not be finite, and where there is no
// room left for its raw weights; raw_count then says how much there should have been.
Status merge(const MergeList& list, const MergeNotes& notes, int device, cudaStream_t stream);

// Unmerges every tile that is merged. Raw weights come back as W″; restore() then puts them where they belong.
Status unmerge(const MergeList& list, const int8_t* merged, int device, cudaStream_t stream);

// Keys below 0 are none.
Status restore(const MergeList& list, const int64_t* raw_keys, const void* raw_values, int64_t count, int device,
               cudaStream_t stream);

// Adds each weight to its row's sum of the checksum.
Status sum_rows(const MergeList& list, uint32_t* row_sums, int device, cudaStream_t stream);

}  // namespace peftk::cuda
