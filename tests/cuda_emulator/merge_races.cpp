// Runs csrc/cuda/merge.cu for the race detector: a list of fp32 layers of several tiles is merged, summed and unmerged
// in random schedules. Fails also if W is not restored, or if checksums differ.
#include <cstdio>
#include <random>
#include <vector>

#include "cuda/merge.h"

namespace {

using peftk::Dtype;
using peftk::cuda::MergeLayer;

struct Layer {
    int64_t N, K;
    std::vector<int32_t> ranks;
};

std::vector<float> normal(size_t size, float sigma, std::mt19937& random) {
    std::vector<float> values(size);
    for (float& value : values) value = std::normal_distribution<float>(0.0f, sigma)(random);
    return values;
}

bool comes_back(const std::vector<Layer>& layers, uint64_t seed) {
    std::mt19937 random{unsigned(seed)};
    const peftk::cuda::MergeTile tile = peftk::cuda::merge_tile(Dtype::kFloat32);
    std::vector<std::vector<float>> weights, before, A, B;
    std::vector<std::vector<int8_t>> codes;
    std::vector<MergeLayer> table;
    std::vector<int32_t> ends;
    int64_t tiles = 0, rows = 0, elements = 0;
    for (const Layer& layer : layers) {
        const int64_t N = layer.N, K = layer.K, first = int64_t(ends.size()),
                      across = (K + tile.columns - 1) / tile.columns;
        int32_t R = 0;
        for (int32_t rank : layer.ranks) ends.push_back(R += rank);
        weights.push_back(normal(N * K, 1e-3f, random)), before.push_back(weights.back());
        A.push_back(normal(R * K, 1.0f, random)), B.push_back(normal(N * R, 1.0f, random));
        codes.emplace_back(N * K);
        table.push_back({weights.back().data(), K, N, K, codes.back().data(), A.back().data(), B.back().data(), R,
                         first, int64_t(ends.size()), across, tiles, rows, elements, 0});
        tiles += across * ((N + tile.rows - 1) / tile.rows), rows += N, elements += N * K;
    }
    const std::vector<float> scaling(ends.size(), 0.5f);
    const int32_t count = int32_t(table.size()), room = int32_t(elements);
    const peftk::cuda::MergeList list{table.data(), ends.data(),     scaling.data(), count,
                                      tiles,        Dtype::kFloat32, Dtype::kFloat32};
    std::vector<int8_t> merged(tiles);
    std::vector<uint32_t> row_sums(rows), again(rows);
    std::vector<int32_t> refused(count);
    int32_t raw_count = 0;
    std::vector<int64_t> raw_keys(room, -1);
    std::vector<float> raw_values(room);
    const peftk::cuda::MergeNotes notes{
        merged.data(), row_sums.data(), refused.data(), &raw_count, raw_keys.data(), raw_values.data(), room};
    return merge(list, notes, 0, nullptr).ok() && sum_rows(list, again.data(), 0, nullptr).ok() &&
           unmerge(list, merged.data(), 0, nullptr).ok() &&
           restore(list, raw_keys.data(), raw_values.data(), room, 0, nullptr).ok() && raw_count > 0 &&
           row_sums == again && weights == before;
}

}  // namespace

int main() {
    for (uint64_t seed = 0; seed < 2; ++seed) {
        cuda_on_host::cuda_on_host_seed(seed);
        if (comes_back({{130, 70, {17, 3}}, {3, 130, {1}}}, seed)) continue;
        printf("seed %d: wrong\n", int(seed));
        return 1;
    }
}
