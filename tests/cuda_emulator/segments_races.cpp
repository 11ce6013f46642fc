// Runs every kernel of csrc/cuda/segments.cu in random schedules, for the race detector. Fails also if the order of
// rows is wrong.
#include <cstdio>
#include <random>
#include <vector>

#include "cuda/segments.h"

namespace {

// Whether the rows are sorted by id, with rows of the same id in their original order.
bool sorted(const std::vector<int>& ids, const std::vector<int64_t>& order) {
    for (size_t place = 1; place < order.size(); ++place) {
        const int before = ids[order[place - 1]], id = ids[order[place]];
        if (before > id || (before == id && order[place - 1] >= order[place])) return false;
    }
    return true;
}

bool sorts(int64_t M, int64_t adapters) {
    std::mt19937 random(unsigned(M + adapters));
    std::vector<int> ids(M);
    for (int& id : ids) id = std::uniform_int_distribution<int>(-1, int(adapters) - 1)(random);
    const size_t segments = std::min(M, adapters + 1) + 1;
    std::vector<int64_t> order(M);
    std::vector<int> sorted_ids(M), ends(adapters + 1), starts(segments), owners(segments), blocks((M + 15) / 16);
    std::vector<int> workspace(peftk::cuda::segments_workspace(M, adapters));
    const peftk::cuda::SegmentsArgs args{ids.data(),
                                         1,
                                         false,
                                         M,
                                         adapters,
                                         order.data(),
                                         sorted_ids.data(),
                                         ends.data(),
                                         starts.data(),
                                         owners.data(),
                                         blocks.data(),
                                         workspace.data()};
    return peftk::cuda::segments(args, 0, nullptr).ok() && sorted(ids, order);
}

}  // namespace

// Arguments: any number of pairs M, adapters.
int main(int count, char** arguments) {
    for (int i = 1; i + 1 < count; i += 2)
        for (uint64_t seed = 0; seed < 3; ++seed) {
            const int64_t M = atoi(arguments[i]), adapters = atoi(arguments[i + 1]);
            cuda_on_host::cuda_on_host_seed(seed);
            if (sorts(M, adapters)) continue;
            printf("M = %d, %d adapters: wrong\n", int(M), int(adapters));
            return 1;
        }
}
