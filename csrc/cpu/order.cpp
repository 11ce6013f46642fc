#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu/lora_linear.h"
#include "cpu/scratch.h"

namespace peftk {

Order order_by_adapter(const int32_t* ids, int64_t M, const Adapters& adapters) {
    const int32_t count = adapters.count;
    auto* starts = static_cast<int64_t*>(scratch(kStartsSlot, (count + 2) * sizeof(int64_t)));
    memset(starts, 0, (count + 2) * sizeof(int64_t));
    if (!ids) {
        for (int32_t a = count ? 2 : 1; a < count + 2; a++) starts[a] = M;
        return {nullptr, starts};
    }
    int64_t* counts = starts + 1;  // counts[id + 1]; the prefix sums below turn them into ends
    for (int64_t m = 0; m < M; m++) {
        const int32_t id = ids[m];
        if (id < -1 || id >= count || (id >= 0 && !is_occupied(adapters, id))) {
            throw std::invalid_argument("ids[" + std::to_string(m) + "]: expected -1 or an adapter's number below " +
                                        std::to_string(count) + ", got " + std::to_string(id) +
                                        (id >= 0 && id < count ? ", an empty slot" : ""));
        }
        counts[id + 1]++;
    }
    for (int32_t a = 1; a <= count; a++) counts[a] += counts[a - 1];
    // Backwards: rows of one adapter keep their order, and ends become starts.
    auto* tokens = static_cast<int32_t*>(scratch(kOrderSlot, M * sizeof(int32_t)));
    for (int64_t m = M; m-- > 0;) tokens[--counts[ids[m] + 1]] = int32_t(m);
    memmove(starts, counts, (count + 1) * sizeof(int64_t));
    starts[count + 1] = M;
    return {tokens, starts};
}

}  // namespace peftk
