// The backward: dX with the forward's kernel and K and N exchanged, then every adapter's gradients.
//
//   u = (dY B) ⊙ act'(z);  dA = s·uᵀ x̃;  dB = s·dYᵀ act(z);  da = s·Σu;  dβ = ΣdY
//
// The shrink of dX leaves s·u and s·act(z) for every row. The gradients are contractions over an adapter's rows,
// computed by the outer kernel with columns of x̃ or dY in the lanes. A task is one block of columns of one adapter and
// goes through the rows in order, so the sums do not depend on the number of threads.
#include "cpu/kernels/linear.h"

namespace peftk {
namespace PEFTK_LEVEL {

namespace {

constexpr int64_t kPanel = kMaxVectors * W;
constexpr int64_t kColumnBlock = 2 * kPanel;
constexpr int64_t kRowChunk = 128;  // rows of x̃ or dY that are widened together
constexpr int64_t kRowPart = 32;    // rows of one chain of sums, as in `outer`
constexpr int64_t kRowSpan = 8192;  // rows of the third level of sums, for batches of any length

struct Source {  // x̃ or dY
    const void* data;
    int64_t row, columns;
    int dtype;
    const Dropout* dropout;  // null: none
    const float* factor;     // s·u or s·v, [M, v_row] by position
    int64_t ranks;           // of factor; 0: only column sums are wanted
    bool column_sums;        // whether these are wanted

    int64_t sums() const { return ranks + column_sums; }
};

// Whether the rows at positions begin … end - 1 of these columns can be read as they lie.
bool in_place(const LinearOp& op, const Source& source, int64_t begin, int64_t end, int64_t count) {
    if (source.dtype != kFloat32 || source.dropout || count % W != 0 || begin == end) return false;
    for (int64_t i = begin; i < end; i++) {
        if (op.order.token(i) != op.order.token(begin) + i - begin) return false;
    }
    return true;
}

// sum[j] += Σ_i rows[i][j], in parts of kRowPart rows.
void add_rows(const float* rows, int64_t row, int64_t count, int64_t columns, float* sum) {
    for (int64_t first = 0; first < count; first += kRowPart) {
        const int64_t last = min64(first + kRowPart, count);
        for (int64_t j = 0; j < columns; j += W) {
            Vec part = zero();
            for (int64_t i = first; i < last; i++) part = add(part, load(rows + i * row + j));
            store(sum + j, add(load(sum + j), part));
        }
    }
}

// sum[r][j] = Σ_i factor[i][r] source[i][first + j] over the rows at positions begin … end - 1. After these
// source.ranks rows, sum has one more with the column sums Σ_i source[i][first + j] if they are wanted.
void contract_span(const LinearOp& op, const Source& source, int64_t begin, int64_t end, int64_t first, int64_t count,
                   float* sum) {
    const int64_t padded = round_up(count, W);
    float* column_sum = sum + source.ranks * padded;
    for (int64_t j = 0; j < padded && source.column_sums; j += W) store(column_sum + j, zero());
    int64_t row = begin;
    do {
        const int64_t rows = min64(kRowChunk, end - row);
        const float* lanes = nullptr;
        int64_t along = padded;
        if (in_place(op, source, row, row + rows, count)) {
            along = source.row;
            lanes = static_cast<const float*>(source.data) + op.order.token(row) * along + first;
        } else {
            float* chunk = scratch_of<float>(kRowsSlot, kRowChunk * kColumnBlock);
            for (int64_t i = 0; i < rows; i++) {
                const int64_t m = op.order.token(row + i);
                float* to = chunk + i * padded;
                widen(at(source.data, source.dtype, m * source.row + first), source.dtype, count, to);
                if (source.dropout) apply_dropout(*source.dropout, m, source.columns, first, count, to);
            }
            lanes = chunk;
        }
        if (source.column_sums) add_rows(lanes, along, rows, padded, column_sum);
        const Panels panels(padded);
        for (int64_t p = 0; p < panels.count(); p++) {
            const int64_t j = panels.first(p);
            outer<float>(source.ranks, panels.width(p), {source.factor + row * op.v_row, 1, op.v_row}, lanes + j, along,
                         rows, sum + j, padded, row == begin);
        }
        row += rows;
    } while (row < end);
}

// The same over all rows of the adapter, in spans of kRowSpan rows.
void contract(const LinearOp& op, int32_t a, const Source& source, int64_t first, int64_t count, float* sum) {
    const int64_t begin = op.order.begin(a), end = op.order.end(a), size = source.sums() * round_up(count, W);
    contract_span(op, source, begin, min64(begin + kRowSpan, end), first, count, sum);
    for (int64_t row = begin + kRowSpan; row < end; row += kRowSpan) {
        float* span = scratch_of<float>(kWeightSlot, size);
        contract_span(op, source, row, min64(row + kRowSpan, end), first, count, span);
        for (int64_t i = 0; i < size; i += W) store(sum + i, add(load(sum + i), load(span + i)));
    }
}

void grad_A(const LinearOp& op, int32_t a, const Source& x, void* to, int64_t first, int64_t count) {
    const int64_t padded = round_up(count, W), rank = x.ranks;
    float* sum = scratch_of<float>(kTileSlot, x.sums() * padded);
    contract(op, a, x, first, count, sum);
    const int dtype = op.adapters.dtype;
    for (int64_t r = 0; r < rank; r++) narrow(sum + r * padded, count, at(to, dtype, r * x.columns + first), dtype);
}

void grad_B(const LinearOp& op, int32_t a, const Source& dy, void* to, void* to_bias, int64_t first, int64_t count) {
    const int64_t padded = round_up(count, W), rank = dy.ranks, ranks = round_up(rank, W);
    float* sum = scratch_of<float>(kTileSlot, (ranks + 1) * padded);
    contract(op, a, dy, first, count, sum);
    const int dtype = op.adapters.dtype;
    if (to_bias) narrow(sum + rank * padded, count, at(to_bias, dtype, first), dtype);
    if (!to) return;
    float* transposed = scratch_of<float>(kAccumulatorSlot, padded * ranks);
    for (int64_t r = 0; r < ranks; r += W) {
        for (int64_t j = 0; j < padded; j += W)
            transpose(sum + r * padded + j, padded, transposed + j * ranks + r, ranks);
    }
    for (int64_t j = 0; j < count; j++) narrow(transposed + j * ranks, rank, at(to, dtype, (first + j) * rank), dtype);
}

void grad_rank_bias(const LinearOp& op, int32_t a, void* to) {
    const int64_t rank = op.rank(a), padded = round_up(rank, W), end = op.order.end(a);
    float* sum = scratch_of<float>(kTileSlot, 2 * padded);
    float* span = sum + padded;
    for (int64_t r = 0; r < padded; r += W) store(sum + r, zero());
    for (int64_t row = op.order.begin(a); row < end; row += kRowSpan) {
        for (int64_t r = 0; r < padded; r += W) store(span + r, zero());
        add_rows(op.v + row * op.v_row, op.v_row, min64(kRowSpan, end - row), padded, span);
        for (int64_t r = 0; r < padded; r += W) store(sum + r, add(load(sum + r), load(span + r)));
    }
    narrow(sum, rank, to, op.adapters.dtype);
}

void adapter_grads(const LinearOp& op, const LinearBackwardArgs& args) {
    const LinearArgs& forward = args.forward;
    const Dropout* dropout = forward.dropout.on ? &forward.dropout : nullptr;
    const int64_t blocks_A = ceil_div(forward.K, kColumnBlock), blocks_B = ceil_div(forward.N, kColumnBlock);
    const int64_t each = blocks_A + blocks_B + 1;
    auto body = [&](int64_t task) {
        const int32_t a = int32_t(task / each);
        const int64_t block = task % each;
        const Source x{forward.x, forward.x_stride, forward.K, forward.x_dtype, dropout, op.v, op.rank(a), false};
        auto grad = [&](int which) { return reinterpret_cast<void*>(args.grads[4 * a + which]); };
        const int64_t ranks_B = op.wants_w(a) ? op.rank(a) : 0;
        const Source dy{args.dy, args.dy_stride, forward.N, args.dy_dtype, nullptr, op.w, ranks_B, grad(3) != nullptr};
        if (block < blocks_A) {
            const int64_t first = block * kColumnBlock;
            if (grad(0)) grad_A(op, a, x, grad(0), first, min64(kColumnBlock, forward.K - first));
        } else if (block < blocks_A + blocks_B) {
            const int64_t first = (block - blocks_A) * kColumnBlock;
            if (grad(1) || grad(3)) {
                grad_B(op, a, dy, grad(1), grad(3), first, min64(kColumnBlock, forward.N - first));
            }
        } else if (grad(2)) {
            grad_rank_bias(op, a, grad(2));
        }
    };
    parallel_for(op.adapters.count * each, op.threads, body);
}

// to[r][c] = element (r, c) of a page. Blocks are transposed in fp32 registers, which keep values of T exactly.
template <class T>
void transpose_page(const T* from, const Factor& factor, int ranks, int64_t C, T* to) {
    for (int64_t c = 0; c < C; c += W) {
        for (int r = 0; r < ranks; r += W) {
            if (factor.rank == 1 && C - c >= W && ranks - r >= W) {
                Vec transposed[W];
                transpose(from + c * factor.along + r, factor.along, transposed);
#pragma GCC unroll 16
                for (int j = 0; j < W; j++) store(to + (r + j) * C + c, transposed[j]);
                continue;
            }
            for (int64_t i = c; i < min64(c + W, C); i++) {
                for (int j = r; j < min64(r + W, ranks); j++) to[j * C + i] = from[i * factor.along + j * factor.rank];
            }
        }
    }
}

// The shrink of dX contracts along N: pages of B whose ranks are not contiguous along N are copied so that they are.
void transpose_pages(LinearOp* op, int64_t page_count) {
    auto* transposed = scratch_of<Factor>(kPagesSlot, page_count);
    const int64_t size = size_of(op->adapters.dtype), page_bytes = 16 * op->C * size;
    int64_t copies = 0;
    auto each_page = [&](auto visit) {
        for (int32_t a = 0; a < op->adapters.count; a++) {
            if (op->order.begin(a) == op->order.end(a)) continue;
            for (int64_t p = 0; 16 * p < op->rank(a); p++) visit(a, p);
        }
    };
    auto is_copied = [&](int32_t a, int64_t p) { return op->factor_B(a, p).along != 1 && op->wants_v(a); };
    each_page([&](int32_t a, int64_t p) { copies += is_copied(a, p); });
    char* memory = scratch_of<char>(kTransposedSlot, copies * page_bytes);
    each_page([&](int32_t a, int64_t p) {
        const Factor factor = op->factor_B(a, p);
        Factor& result = transposed[op->page(a, p)];
        result = factor;
        if (!is_copied(a, p)) return;
        with_type(op->adapters.dtype, [&](auto type) {
            typedef decltype(type) T;
            const T* from = static_cast<const T*>(factor.data);
            T* to = reinterpret_cast<T*>(memory);
            transpose_page(from, factor, op->page_ranks(a, p), op->C, to);
        });
        result = {memory, op->C, 1};
        memory += page_bytes;
    });
    op->transposed = transposed;
}

}  // namespace

void lora_linear_backward(const LinearBackwardArgs& args, const Order& order) {
    const LinearArgs& forward = args.forward;
    LinearOp op = forward_op(forward, order);
    op.backward = true;
    op.threads = useful_threads(work_of(forward, args.dx && !forward.over_base), forward.threads);
    op.grads = args.grads;
    op.C = forward.N, op.O = forward.K;
    op.in = args.dy, op.in_row = args.dy_stride, op.in_dtype = args.dy_dtype;
    op.weight_o = forward.weight_k, op.weight_c = forward.weight_n;
    op.bias = nullptr;
    op.out = args.dx, op.out_row = args.dx_stride;
    op.w = scratch_of<float>(kUSlot, op.M * op.v_row);
    int64_t page_count = 0;
    for (int32_t a = 0; a < op.adapters.count; a++) {
        const int64_t last = op.page(a, ceil_div(op.rank(a), kPage));
        if (last > page_count) page_count = last;
    }
    transpose_pages(&op, page_count);
    run(op);
    adapter_grads(op, args);
}

}  // namespace PEFTK_LEVEL
}  // namespace peftk
