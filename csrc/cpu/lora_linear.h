// Arguments of the CPU kernels for the fused linear layer, and the order of its rows.
#pragma once

#include <cstdint>

#include "common/adapters.h"
#include "cpu/levels.h"

namespace peftk {

// Rows of x sorted by adapter. Position i is row token(i). Adapter a has the positions from starts[a + 1] up to, but
// without, starts[a + 2]; a = -1 is the base layer.
struct Order {
    const int32_t* tokens;  // null: position i is row i
    const int64_t* starts;  // [count + 2]

    int64_t token(int64_t position) const { return tokens ? tokens[position] : position; }
    int64_t begin(int adapter) const { return starts[adapter + 1]; }
    int64_t end(int adapter) const { return starts[adapter + 2]; }
};

// Sorts rows by ids. ids null: every row uses adapter 0, or the base layer if there are no adapters. The memory is this
// thread's scratch. Throws std::invalid_argument for an id that is no adapter of the table.
Order order_by_adapter(const int32_t* ids, int64_t M, const Adapters& adapters);

struct Dropout {
    bool on = false;
    uint32_t threshold = 0;  // an element is dropped if its random word is below
    float scale = 1;         // 1 / (1 - p)
    uint64_t seed = 0;
};

// How the elements of a packed W are stored (peftk/quantized/formats.py has the layouts).
enum Codes : int {
    kPlain,    // not packed
    kInt8,     // one signed byte an element
    kHalves,   // 4 bits: byte i of 16 has elements i and i + 16
    kPairs,    // 4 bits: byte i has elements 2i, in its high half, and 2i + 1
    kBlocks8,  // 34 bytes for 32 elements: an fp16 scale and 32 signed bytes
    kBlocks4,  // 18 bytes for 32 elements: an fp16 scale and 16 bytes of halves
};

// What the elements of a packed W mean: scale * code, scale * (code - zero) of halves, scale * table[code] of pairs.
// Rows have a multiple of 32 elements, but for kInt8 with one scale a row.
struct Packing {
    int codes = kPlain;
    int64_t row_bytes = 0;
    int64_t groups = 0;            // a row has so many scales
    int group_shift = 0;           // element k has scale k >> group_shift
    const void* scales = nullptr;  // [N, groups], scale_dtype; in the blocks if there are blocks
    int scale_dtype = kFloat32;
    float scale_factor = 1;          // of every scale of kInt8
    const uint8_t* zeros = nullptr;  // [N, groups], or null: 8
    const float* table = nullptr;    // [16]
};

// The arguments that forward and backward share: x and the base layer. Strides are in elements. W has unit stride
// along K or along N.
struct Linear {
    int64_t M, N, K;
    bool over_base;  // y, or dX, already holds the base layer's part: the adapters' part is added in place, and W and
                     // bias are not read
    const void* x;
    int64_t x_stride;
    int x_dtype;
    const void* weight;
    int64_t weight_n, weight_k;
    int weight_dtype;
    Packing packing;   // a packed W has unit stride along K, and weight_dtype fp32, to which it is decoded
    const void* bias;  // [N] or null; not read by the backward
    int bias_dtype;
    Dropout dropout;
    bool batch_invariant;  // a row's bits must not depend on the other rows, nor on how many there are
    int threads;
};

// y[m] = x[m] Wᵀ + bias + s act(x̃[m] Aᵀ + a) Bᵀ + β.
struct LinearArgs : Linear {
    void* y;  // x's dtype
    int64_t y_stride;
    float* z;  // [M, z_stride] or null: pre-activations, written for the ranks of a row's adapter
    int64_t z_stride;
    Adapters adapters;
    const int32_t* ids;
};

// The arguments of the backward: dX, and the dense gradients of every adapter in the adapters' dtype.
struct LinearBackwardArgs {
    // y is not used; x is read only for dA, W only for dX. z is the forward's, and may be null if no dB is wanted and
    // every activation is the identity. over_base: dx already holds dY · W
    LinearArgs forward;
    const void* dy;
    int64_t dy_stride;
    int dy_dtype;
    void* dx;  // [M, K], x's dtype; null: not wanted
    int64_t dx_stride;
    const int64_t* grads;  // [count, 4], addresses: dA [R, K], dB [N, R], da [R], dβ [N]; 0: not wanted
};

// Multiply-adds of the adapters' part.
static inline double adapters_work(const LinearArgs& args) {
    int32_t most = 0;
    for (int32_t a = 0; a < args.adapters.count; a++) {
        const int32_t rank = adapter_at(args.adapters, a).rank;
        if (rank > most) most = rank;
    }
    return double(args.M) * most * double(args.K + args.N);
}

// Multiply-adds of the product with W.
static inline double product_work(const Linear& linear) {
    return double(linear.M) * double(linear.N) * double(linear.K);
}

// Multiply-adds of the product if the call computes it, else of the adapters' part.
static inline double work_of(const LinearArgs& args, bool product) {
    return product ? product_work(args) : adapters_work(args);
}

// How a call is computed. Depends only on the shapes, dtypes and strides of `linear`, and on `batch_invariant`.
struct Plan {
    const char* form;  // dot, lanes, columns, panels or transposed
    bool pairs;        // whether bf16 pairs are multiplied by the processor's instruction for them
    int threads;       // at most
};

PEFTK_DECLARE(void, lora_linear_plan, (const Linear& linear, bool backward, Plan* plan))
PEFTK_DECLARE(void, lora_linear, (const LinearArgs& args, const Order& order))
PEFTK_DECLARE(void, lora_linear_backward, (const LinearBackwardArgs& args, const Order& order))

}  // namespace peftk
