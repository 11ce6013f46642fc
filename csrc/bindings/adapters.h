// The adapters of a call from addresses: a table that Python has built, or one dense adapter.
#pragma once

#include <cstdint>
#include <new>

#include "common/dtype.h"
#include "cpu/lora_linear.h"
#include "cpu/scratch.h"

namespace peftk {

template <class T>
static inline T* address(uintptr_t value) {
    return reinterpret_cast<T*>(value);
}

static inline Adapters table_of(uintptr_t pages, uintptr_t rows, uintptr_t scaling, uintptr_t biases, int count,
                                int dtype) {
    return {address<int64_t>(pages),
            address<int32_t>(rows),
            address<float>(scaling),
            address<int64_t>(biases),
            count,
            dtype};
}

// The table of one dense adapter, in this thread's scratch: a call for one adapter makes no tensors. (A few bytes more
// than peftk/adapters/table.py's layout would be, in the same form.)
static inline Adapters table_of_one(uintptr_t A, int64_t A_stride, uintptr_t B, int64_t B_n, int64_t B_r, int rank,
                                    int activation, float scaling, uintptr_t bias_A, uintptr_t bias_B, int dtype) {
    struct Head {
        int32_t row[4];
        int64_t biases[2];
        float scaling;
    };
    const int pages = (rank + 15) / 16;
    char* memory = static_cast<char*>(scratch(kTableSlot, sizeof(Head) + 5 * sizeof(int64_t) * size_t(pages)));
    Head* head = new (memory) Head{{0, rank, activation, 1}, {int64_t(bias_A), int64_t(bias_B)}, scaling};
    int64_t* page = reinterpret_cast<int64_t*>(memory + sizeof(Head));
    const int64_t size = size_of(dtype);
    for (int64_t p = 0; p < pages; p++) {
        page[5 * p] = int64_t(A) + 16 * p * A_stride * size;
        page[5 * p + 1] = A_stride;
        page[5 * p + 2] = int64_t(B) + 16 * p * B_r * size;
        page[5 * p + 3] = B_n;
        page[5 * p + 4] = B_r;
    }
    return {page, head->row, &head->scaling, head->biases, 1, dtype};
}

}  // namespace peftk
