// merge.cu for the race detector: `merge_races SEEDS` merges two small weights in one launch and brings them back, in so many
// schedules. tests/on_host/merge.py compares bits; here W must come back, and the sums of a row's tiles be its sum.
#include "cuda/merge.h"

#include <vector>

namespace {

std::vector<float> numbers(int64_t count, int seed) {
    std::vector<float> values(static_cast<size_t>(count));
    for (size_t i = 0; i < values.size(); ++i) values[i] = float((i * 7919 + size_t(seed)) % 101) / 64.0f - 0.7f;
    return values;
}

struct Layer {
    int64_t N, K, R;
    std::vector<float> original = numbers(N * K, 1), weight = original, A = numbers(R * K, 2), B = numbers(N * R, 3);
    std::vector<int8_t> code = std::vector<int8_t>(original.size());
};

bool run() {
    using namespace peftk::cuda;
    Layer layers[] = {{40, 80, 21}, {70, 30, 5}};
    const std::vector<int32_t> ends{3, 21, 5};
    const std::vector<float> scaling{0.5f, -1.5f, 2.0f};
    const MergeTile tile = merge_tile(peftk::kFloat32);

    std::vector<MergeLayer> table;
    int64_t tiles = 0, rows = 0, weights = 0, adapters = 0;
    for (Layer& layer : layers) {
        const int64_t across = (layer.K + tile.columns - 1) / tile.columns, first_adapter = adapters;
        adapters += layer.R == 21 ? 2 : 1;
        table.push_back({layer.weight.data(), layer.K, layer.N, layer.K, layer.code.data(), layer.A.data(),
                         layer.B.data(), layer.R, first_adapter, adapters, across, tiles, rows, weights, 0});
        tiles += across * ((layer.N + tile.rows - 1) / tile.rows);
        rows += layer.N;
        weights += layer.N * layer.K;
    }
    const MergeList list{table.data(), ends.data(), scaling.data(), 2, tiles, peftk::kFloat32, peftk::kFloat32};
    std::vector<int8_t> merged(static_cast<size_t>(tiles));
    std::vector<uint32_t> sums(static_cast<size_t>(rows)), sums_after(sums.size());
    std::vector<int32_t> refused(2);
    int32_t raw_count = 0;
    std::vector<int64_t> raw_keys(static_cast<size_t>(weights), -1);
    std::vector<float> raw_values(raw_keys.size());
    const MergeNotes notes{merged.data(),   sums.data(),       refused.data(),  &raw_count,
                           raw_keys.data(), raw_values.data(), int32_t(weights)};
    const auto check = [](const Status& status) {
        if (!status.ok()) cuda_on_host::fail("merge: %s", cudaGetErrorName(status.error));
    };
    check(merge(list, notes, 0, nullptr));
    for (const Layer& layer : layers)
        if (layer.weight == layer.original) return false;
    check(sum_rows(list, sums_after.data(), 0, nullptr));
    check(unmerge(list, merged.data(), 0, nullptr));
    check(restore(list, raw_keys.data(), raw_values.data(), weights, 0, nullptr));
    return layers[0].weight == layers[0].original && layers[1].weight == layers[1].original && sums == sums_after;
}

}  // namespace

int main(int count, char** arguments) {
    if (count != 2) return 2;
    for (int seed = 0; seed < atoi(arguments[1]); ++seed) {
        cuda_on_host::cuda_on_host_seed(uint64_t(seed));
        if (run()) continue;
        printf("wrong with seed %d\n", seed);
        return 1;
    }
    return 0;
}
