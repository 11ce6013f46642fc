// One description of forward and dX: C is the length of the contraction, O the number of output columns.
#pragma once

#include "common/activation.h"
#include "cpu/blocking.h"
#include "cpu/kernels/rows.h"
#include "cpu/scratch.h"
#include "cpu/thread_pool.h"

namespace peftk {
namespace PEFTK_LEVEL {

template <class T>
static inline T* scratch_of(ScratchSlot slot, int64_t count) {
    return static_cast<T*>(scratch(slot, size_t(count) * sizeof(T)));
}

static inline float element(const void* data, int dtype, int64_t index) {
    float value = 0;
    with_type(dtype, [&](auto type) { value = to_float(static_cast<const decltype(type)*>(data)[index]); });
    return value;
}

// Up to 16 ranks of A or B: element i of rank r is at data[r * rank + i * along].
struct Factor {
    const void* data;
    int64_t rank, along;
};

struct Columns {
    int64_t first, count, padded;  // padded: count rounded up to whole registers
};

struct LinearOp {
    int64_t M, C, O;
    const void* in;
    int64_t in_row;
    int in_dtype;
    const void* weight;
    int64_t weight_o, weight_c;  // strides
    int weight_dtype;
    Packing packing;
    const void* bias;
    int bias_dtype;
    bool over_base;  // out already holds the base layer's part
    void* out;       // null: only v and w are computed
    int64_t out_row;
    int out_dtype;
    float* z;  // [M, z_row]: written by the forward, read by the backward
    int64_t z_row;
    Adapters adapters;
    Order order;
    Dropout dropout;
    bool batch_invariant;
    Blocking blocking;
    int threads;
    bool backward;
    int64_t max_rank;  // over the adapters that have rows
    float* v;          // [M, v_row] by position: s·v forward, s·u backward
    float* w;          // backward: s·v
    int64_t v_row;
    const Factor* transposed;  // backward: the pages of B, contiguous along N, by page number
    const int64_t* grads;      // backward: [count, 4], see LinearBackwardArgs

    bool packed() const { return packing.codes != kPlain; }
    // The address of W's element of output column o and step c; of a packed W, of the byte or block that begins at or
    // before it.
    const char* weight_at(int64_t o, int64_t c) const {
        const char* base = static_cast<const char*>(weight);
        if (!packed()) return base + (o * weight_o + c * weight_c) * size_of(weight_dtype);
        const int64_t row = weight_c == 1 ? o : c, k = weight_c == 1 ? c : o;
        return base + row * packing.row_bytes + bytes_in_row(k);
    }
    // Elements, and bytes, from one row of W in memory to the next.
    int64_t row_elements() const { return weight_c == 1 ? weight_o : weight_c; }
    int64_t weight_row_bytes() const { return packed() ? packing.row_bytes : row_elements() * size_of(weight_dtype); }
    // Bytes of consecutive elements of a row.
    int64_t bytes_in_row(int64_t elements) const {
        return packed() ? elements * packing.row_bytes / row_elements() : elements * size_of(weight_dtype);
    }
    // Bytes of an element, for choosing sizes of blocks: packed elements count as 16 bits.
    int64_t weight_bytes() const { return packed() ? 2 : size_of(weight_dtype); }

    Adapter adapter(int32_t a) const { return adapter_at(adapters, a); }
    int64_t rank(int32_t a) const { return adapter(a).rank; }
    int64_t page(int32_t a, int64_t p) const { return adapter(a).first_page + p; }  // its number
    int page_ranks(int32_t a, int64_t p) const { return int(min64(kPage, rank(a) - kPage * p)); }

    // Which results of the shrink are needed: v in the forward and s·u in the backward; s·v in the backward.
    bool wants_v(int32_t a) const { return !backward || out || grads[4 * a] || grads[4 * a + 2]; }
    bool wants_w(int32_t a) const { return backward && grads[4 * a + 1]; }

    Factor factor_A(int32_t a, int64_t p) const {
        const Page entry = page_at(adapters, page(a, p));
        return {reinterpret_cast<const void*>(entry.A), entry.stride_A, 1};
    }
    Factor factor_B(int32_t a, int64_t p) const {
        const Page entry = page_at(adapters, page(a, p));
        return {reinterpret_cast<const void*>(entry.B), entry.stride_Br, entry.stride_Bn};
    }
    Factor shrink_factor(int32_t a, int64_t p) const { return backward ? transposed[page(a, p)] : factor_A(a, p); }
    Factor expand_factor(int32_t a, int64_t p) const { return backward ? factor_A(a, p) : factor_B(a, p); }
};

// With fewer multiply-adds per thread, waking a thread costs more than it gains.
constexpr double kWorkPerThread = 1 << 16;

static inline int useful_threads(double work, int most) {
    const double threads = work / kWorkPerThread;
    return threads < 2 || most < 1 ? 1 : threads < most ? int(threads) : most;
}

static inline int64_t max_rank(const Adapters& adapters, const Order& order) {
    int64_t most = 0;
    for (int32_t a = 0; a < adapters.count; a++) {
        if (order.begin(a) < order.end(a)) most = max64(most, adapter_at(adapters, a).rank);
    }
    return most;
}

static inline LinearOp forward_op(const LinearArgs& args, const Order& order) {
    LinearOp op{};
    op.M = args.M, op.C = args.K, op.O = args.N;
    op.in = args.x, op.in_row = args.x_stride, op.in_dtype = args.x_dtype;
    op.weight = args.weight, op.weight_o = args.weight_n, op.weight_c = args.weight_k;
    op.weight_dtype = args.weight_dtype, op.packing = args.packing;
    op.over_base = args.over_base;
    op.bias = args.over_base ? nullptr : args.bias, op.bias_dtype = args.bias_dtype;
    op.out = args.y, op.out_row = args.y_stride, op.out_dtype = args.x_dtype;
    op.z = args.z, op.z_row = args.z_stride;
    op.adapters = args.adapters, op.order = order, op.dropout = args.dropout;
    op.batch_invariant = args.batch_invariant;
    op.blocking = blocking_in_use();
    op.threads = useful_threads(work_of(args, !args.over_base), args.threads);
    op.max_rank = max_rank(args.adapters, order);
    op.v_row = round_up(op.max_rank, 16);
    op.v = scratch_of<float>(kVSlot, round_up(op.M, W) * op.v_row);  // rows are read in whole registers
    return op;
}

void run(const LinearOp& op);

}  // namespace PEFTK_LEVEL
}  // namespace peftk
