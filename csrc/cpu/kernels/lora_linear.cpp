// The fused linear layer: the forward, and dX, which is the forward with K and N exchanged.
//
// Both compute out[m] = in[m] · Wᵀ + bias + expand(v[m]) + β, where v comes from in[m] by a contraction of the same
// length (the shrink). Rows are processed in the order of their adapters. A job has three kinds of tasks: some convert
// the input to the form that the product reads; some shrink; and some compute blocks of output columns, from W to the
// stored result. The last kind waits for the first before its product, and for the second before its epilogue. The
// product has one of these forms:
//
//   dot      few rows, W contiguous along the contraction: lanes along the contraction, everything is read in place
//   lanes    many rows, W contiguous along the contraction: lanes are rows of the input, W's elements are broadcast
//   columns  W contiguous along the output: lanes are columns of W, the input's elements are broadcast
//   panels   instead of lanes and columns where a level has it, but for pairs (cpu/kernels/panels.h)
//   transposed  instead of dot in batch-invariant mode: the sums of lanes, or panels (cpu/kernels/transposed.h)
//
// There is no product if `out` already holds the base layer's part: the adapters' part is added to it.
//
// The form depends only on shape, dtypes and strides, so the number of threads does not change a bit of the result.
#include "cpu/kernels/linear.h"
#include "cpu/kernels/packed.h"
#include "cpu/kernels/transposed.h"
#ifdef PEFTK_FEW_ROWS
#include "cpu/kernels/few_rows.h"
#elif defined(PEFTK_PANELS)
#include "cpu/kernels/panels.h"
#endif

namespace peftk {
namespace PEFTK_LEVEL {

namespace {

// A group of rows of one adapter, which share a pass over a page of a factor.
struct Group {
    int32_t adapter, count;
    int64_t first;
};

constexpr int64_t kMinRowsPerThread = 4 * W;      // rows per thread from which each thread reads all of W on its own
constexpr int64_t kMaxWeightPerThread = 1 << 22;  // bytes of W up to which each thread reads all of it
constexpr int64_t kSteps = 256;                   // of the contraction: a panel of the lanes operand stays in L1
constexpr int64_t kColumnSteps = 64;              // the same in the columns form, whose panels together are wider
constexpr int64_t kPad = 16;  // padding between rows of scratch, in elements, against cache-set conflicts

constexpr int64_t kBaseColumns = 128;  // columns per task if only the adapters' part is added: a tile stays in L1

enum Form { kDot, kLanes, kColumns, kPanels, kTransposed, kOverBase };
#ifdef PEFTK_PANELS
constexpr bool kHavePanels = true;
#else
constexpr bool kHavePanels = false;
constexpr int64_t kDotTokens32 = kMaxDotTokens, kDotTokens16 = kMaxDotTokens;
static inline int64_t panel_columns(const LinearOp&) { return 0; }
static inline int64_t tile_height(const LinearOp&) { return 0; }
#endif
#ifndef PEFTK_FEW_ROWS
static inline bool are_few(const LinearOp&) { return false; }
#endif

struct Shape {
    Form form;
    bool pairs;         // both sides are bf16, and the level has the instruction for pairs
    int64_t steps;      // of the contraction: C, or the number of pairs
    int64_t in_row;     // dot, columns, transposed: row stride of the prepared input, in steps
    int64_t rows;       // rows of this block
    int64_t first_row;  // position of its first row
    void* in;           // prepared input of this block
};

#ifdef PEFTK_DP
constexpr bool kHavePairs = true;
#else
constexpr bool kHavePairs = false;
#endif

// ---- shrink -------------------------------------------------------------------------------------------------------

// out [count, 16] = in[i] · factorᵀ for a group of rows and some ranks. `after`: the factor that is read next.
void project(const LinearOp& op, const Group& group, const void* const* rows, bool widened, const Factor& factor,
             int ranks, const void* after, float* out) {
    const auto dot_of = [&](auto row_type, auto factor_type) {
        typedef decltype(row_type) T;
        typedef decltype(factor_type) U;
        const auto* x = reinterpret_cast<const T* const*>(rows);
        const U* data = static_cast<const U*>(factor.data);
        int done = 0;
        if constexpr (kStreams == 1) {  // a single row: with more ranks at once fewer chains of fma wait for each other
            for (; group.count == 1 && ranks - done >= 8; done += 8) {
                const U* w = data + done * factor.rank;
                dot_rows<T, const U*, 1, 8>(1, x, w, factor.rank, op.C, out + done, 16, w);
            }
        }
        dot(group.count, x, ranks - done, data + done * factor.rank, factor.rank, op.C, out + done, 16,
            static_cast<const U*>(after));
    };
    if (widened) {
        with_type(op.adapters.dtype, [&](auto type) { dot_of(float{}, type); });
    } else {
#ifdef PEFTK_DP
        dot_of(bf16{}, bf16{});
#endif
    }
}

// Used by a backward without z, which does not depend on z's values.
constexpr float kNoZ[16] = {};

// Computes z and v (backward: s·u and s·v) of a group of rows, for the ranks of pages first_page … last_page - 1.
// `after`: the group that comes next.
void shrink(const LinearOp& op, const Group& group, const Group& after, int64_t first_page, int64_t last_page) {
    const bool drops = op.dropout.on && !op.backward;
    const bool pairs = kHavePairs && op.in_dtype == kBFloat16 && op.adapters.dtype == kBFloat16 && !drops;
    const bool wants_v = op.wants_v(group.adapter), wants_w = op.wants_w(group.adapter);
    const bool copies = wants_v && (drops || (op.in_dtype != kFloat32 && !pairs));
    const int64_t copy_row = round_up(op.C, W) + kPad;
    float* copy = copies ? scratch_of<float>(kRowsSlot, group.count * copy_row) : nullptr;
    const void* rows[kDotTokens];
    for (int i = 0; i < group.count; i++) {
        const int64_t m = op.order.token(group.first + i);
        rows[i] = at(op.in, op.in_dtype, m * op.in_row);
        if (copies) {
            float* row = copy + i * copy_row;
            widen(rows[i], op.in_dtype, op.C, row);
            if (drops) apply_dropout(op.dropout, m, op.C, 0, op.C, row);
            rows[i] = row;
        }
    }
    const int32_t a = group.adapter;
    const Adapter adapter = op.adapter(a);
    const int code = adapter.activation;
    const float s = adapter.scaling;
    const void* bias = reinterpret_cast<const void*>(adapter.bias_A);
    for (int64_t page = first_page; page < last_page; page++) {
        const int ranks = op.page_ranks(a, page);
        float out[kDotTokens * 16];
        const bool more = page + 1 < ceil_div(op.rank(a), 16);
        if (wants_v) {
            const Factor next = more ? op.shrink_factor(a, page + 1) : op.shrink_factor(after.adapter, 0);
            project(op, group, rows, !pairs, op.shrink_factor(a, page), ranks, next.data, out);
        }
        for (int i = 0; i < group.count; i++) {
            const int64_t position = group.first + i, m = op.order.token(position);
            float* z = op.z ? op.z + m * op.z_row + 16 * page : nullptr;
            const float* pre = z ? z : kNoZ;
            float* v = op.v + position * op.v_row + 16 * page;
            float* w = op.w ? op.w + position * op.v_row + 16 * page : nullptr;
            const float* sums = out + i * 16;
            // For the identity, called with a constant code: its loops contain no switch and are vectorized.
            const auto finish = [&](int code) __attribute__((always_inline)) {
                for (int r = 0; r < ranks && op.backward && wants_v; r++) {
                    v[r] = s * (sums[r] * activate_derivative(code, pre[r]));
                }
                for (int r = 0; r < ranks && op.backward && wants_w; r++) w[r] = s * activate(code, pre[r]);
                for (int r = 0; r < ranks && !op.backward; r++) v[r] = s * activate(code, sums[r]);
            };
            if (!op.backward) {
                for (int r = 0; r < ranks && bias; r++) {
                    out[i * 16 + r] += element(bias, op.adapters.dtype, 16 * page + r);
                }
                if (z) memcpy(z, sums, ranks * sizeof(float));
            }
            if (code == kIdentity) {
                finish(kIdentity);
            } else {
                finish(code);
            }
        }
    }
}

// ---- the input's prepared forms -----------------------------------------------------------------------------------

// Rows that one task prepares.
int64_t prepared_rows(const LinearOp& op, const Shape& shape) { return shape.form == kPanels ? tile_height(op) : W; }

// Copies steps first … first + steps - 1 of a row of the input, in fp32 or pairs.
void copy_steps(const LinearOp& op, [[maybe_unused]] const Shape& shape, const void* row, int64_t first, int64_t steps,
                float* to) {
#ifdef PEFTK_DP
    if (shape.pairs) {
        const int64_t n = min64(2 * steps, op.C - 2 * first);
        return copy_pairs(static_cast<const bf16*>(row) + 2 * first, n, reinterpret_cast<Pair*>(to));
    }
#endif
    widen(at(row, op.in_dtype, first), op.in_dtype, steps, to);
}

// Prepares W rows of the block, from row W · part on; in the panels form, tile number `part`.
void prepare(const LinearOp& op, const Shape& shape, int64_t part) {
#ifdef PEFTK_PANELS
    if (shape.form == kPanels) {
        return pack_rows(op, PackedRows(op, shape.in, shape.rows), shape.first_row, part);
    }
#endif
    const int64_t first = part * W;
    const int count = int(min64(W, shape.rows - first));
    const void* rows[W];
    for (int i = 0; i < count; i++) {
        rows[i] = at(op.in, op.in_dtype, op.order.token(shape.first_row + first + i) * op.in_row);
    }
    if (shape.form == kLanes) {
        const Panels panels(shape.rows);
        const int64_t panel = panels.of_lane(first), lane = panels.first(panel), width = panels.width(panel) * W;
        float* to = static_cast<float*>(shape.in) + lane * shape.steps + (first - lane);
#ifdef PEFTK_DP
        if (shape.pairs) {
            return transpose_rows(count, shape.steps, to, width, [&](int i, int64_t s, int n, float* out) {
                const bf16* from = static_cast<const bf16*>(rows[i]) + 2 * s;
                copy_pairs(from, min64(2 * n, op.C - 2 * s), reinterpret_cast<Pair*>(out));
            });
        }
#endif
        with_type(op.in_dtype, [&](auto type) {
            typedef decltype(type) T;
            transpose_rows(count, shape.steps, to, width, [&](int i, int64_t s, int n, float* out) {
                widen(static_cast<const T*>(rows[i]) + s, n, out);
            });
        });
    } else {
        for (int i = 0; i < count; i++) {
            float* to = static_cast<float*>(shape.in) + (first + i) * shape.in_row;
            if (shape.form == kTransposed) {
                interleave_parts(shape.steps, shape.pairs, to,
                                 [&](int64_t s, int64_t n, float* out) { copy_steps(op, shape, rows[i], s, n, out); });
                continue;
            }
#ifdef PEFTK_DP
            if (shape.pairs) {
                copy_pairs(static_cast<const bf16*>(rows[i]), op.C, reinterpret_cast<Pair*>(to));
                continue;
            }
#endif
            if (shape.form == kDot && reads_even_odd(op)) {
                with_type(op.in_dtype,
                          [&](auto type) { split_even_odd(static_cast<const decltype(type)*>(rows[i]), op.C, to); });
                continue;
            }
            widen(rows[i], op.in_dtype, op.C, to);
        }
    }
}

// ---- the product with W, one function per form; the result is a tile [rows, columns], for lanes its transpose -------

void product_dot(const LinearOp& op, const Shape& shape, const Columns& columns, float* tile) {
    const void* weight = at(op.weight, op.weight_dtype, columns.first * op.weight_o);
    const void* after = at(weight, op.weight_dtype, columns.count * op.weight_o);
    const void* rows[kMaxDotTokens];
#ifdef PEFTK_DP
    if (shape.pairs) {
        for (int64_t i = 0; i < shape.rows; i++) {
            rows[i] = at(op.in, op.in_dtype, op.order.token(shape.first_row + i) * op.in_row);
        }
        return dot(shape.rows, reinterpret_cast<const bf16* const*>(rows), columns.count,
                   static_cast<const bf16*>(weight), op.weight_o, op.C, tile, columns.padded,
                   static_cast<const bf16*>(after));
    }
#endif
    for (int64_t i = 0; i < shape.rows; i++) rows[i] = static_cast<const float*>(shape.in) + i * shape.in_row;
    if (op.packed()) return packed_dot(op, shape.rows, rows, columns.first, columns.count, tile, columns.padded);
    if (op.weight_dtype == kBFloat16) {
        return dot(shape.rows, reinterpret_cast<const EvenOdd* const*>(rows), columns.count,
                   static_cast<const bf16*>(weight), op.weight_o, op.C, tile, columns.padded,
                   static_cast<const bf16*>(after));
    }
    with_type(op.weight_dtype, [&](auto type) {
        typedef decltype(type) T;
        dot(shape.rows, reinterpret_cast<const float* const*>(rows), columns.count, static_cast<const T*>(weight),
            op.weight_o, op.C, tile, columns.padded, static_cast<const T*>(after));
    });
}

template <class T, class X>
void product_transposed(const LinearOp& op, const Shape& shape, const Columns& columns, float* tile) {
    TransposedRows<T, X> its{};
    its.x = static_cast<const X*>(shape.in), its.x_row = shape.in_row;
    its.w_row = op.weight_o, its.C = op.C, its.steps = shape.steps;
    int64_t groups = 0;
    visit_groups(shape.steps, shape.pairs, [&](int64_t, int64_t count, int64_t) { groups += count; });
    its.sums = scratch_of<float>(kWeightSlot, groups * shape.rows * kSumsOfGroup);
    its.c_row = columns.padded;
    for (int64_t o = 0; o < columns.count; o += W) {
        its.w = static_cast<const T*>(op.weight) + (columns.first + o) * op.weight_o;
        its.count = min64(W, columns.count - o), its.c = tile + o;
        transposed_rows<T, X>(shape.rows, its);
    }
}

void product_transposed(const LinearOp& op, const Shape& shape, const Columns& columns, float* tile) {
#ifdef PEFTK_DP
    if (shape.pairs) return product_transposed<bf16, Pair>(op, shape, columns, tile);
#endif
    with_type(op.weight_dtype, [&](auto type) { product_transposed<decltype(type), float>(op, shape, columns, tile); });
}

// Copies steps first … first + steps - 1 of the block's rows of W to [count, row], in fp32 or pairs.
void copy_weight_rows(const LinearOp& op, [[maybe_unused]] const Shape& shape, const Columns& columns, int64_t first,
                      int64_t steps, float* to, int64_t row) {
    for (int64_t o = 0; o < columns.count; o++) {
#ifdef PEFTK_DP
        if (shape.pairs) {
            const int64_t c = 2 * first;
            const void* from = at(op.weight, op.weight_dtype, (columns.first + o) * op.weight_o + c);
            copy_pairs(static_cast<const bf16*>(from), min64(2 * steps, op.C - c),
                       reinterpret_cast<Pair*>(to + o * row));
            continue;
        }
#endif
        read_weight(op, columns.first + o, first, steps, to + o * row);
    }
}

template <class T>
void product_lanes(const LinearOp& op, const Shape& shape, const Columns& columns, float* acc, int64_t acc_row) {
    constexpr int64_t row = kSteps + kPad;
    const Panels panels(shape.rows);
    float* weight = scratch_of<float>(kWeightSlot, columns.count * row);
    int64_t first = 0;
    do {
        // fp32 has shorter parts than this (`outer`), pairs have not
        const int64_t most = op.batch_invariant && shape.pairs ? invariant_part(shape.steps, true, first) : kSteps;
        const int64_t steps = min64(most, shape.steps - first);
        copy_weight_rows(op, shape, columns, first, steps, weight, row);
        // While this part is multiplied, the next panel of the input and the next part of W are prefetched into L2.
        const int64_t next_c = (shape.pairs ? 2 : 1) * (first + steps < shape.steps ? first + steps : 0);
        for (int64_t p = 0; p < panels.count(); p++) {
            const int64_t lane = panels.first(p), width = panels.width(p) * W;
            const int64_t tile = tile_rows(panels.width(p)), tiles = ceil_div(columns.count, tile);
            const T* in = static_cast<const T*>(shape.in) + lane * shape.steps + first * width;
            const char* next_in = reinterpret_cast<const char*>(in + width * shape.steps);
            const int64_t next_bytes = width * steps * int64_t(sizeof(T));
            outer<T>(columns.count, panels.width(p), {reinterpret_cast<const T*>(weight), row, 1}, in, width, steps,
                     acc + lane, acc_row, first == 0, [&](int64_t i) {
                         const int64_t o = p == 0 ? columns.first + i : 0;
                         return Prefetch{next_in + i / tile * (next_bytes / tiles), next_bytes / (tiles * steps + 1),
                                         op.weight_at(o, next_c), op.weight_row_bytes()};
                     });
        }
        first += steps;
    } while (first < shape.steps);
}

// Copies steps first … first + steps - 1 of the block's columns of W to panels [steps, width], in fp32 or pairs.
void copy_weight_columns(const LinearOp& op, const Shape& shape, const Columns& columns, int64_t first, int64_t steps,
                         float* to) {
    const Panels panels(columns.count);
    for (int64_t s = 0; s < steps; s++) {
        const int64_t c = shape.pairs ? 2 * (first + s) : first + s;
        for (int64_t p = 0; p < panels.count(); p++) {
            const int64_t o = panels.first(p), width = panels.width(p) * W, count = min64(width, columns.count - o);
            float* out = to + o * steps + s * width;
#ifdef PEFTK_DP
            if (shape.pairs) {
                const void* from = at(op.weight, op.weight_dtype, c * op.weight_c + columns.first + o);
                const bool both = c + 1 < op.C;
                const bf16 *even = static_cast<const bf16*>(from), *odd = even + op.weight_c;
                for (int64_t j = 0; j < count; j += W) {
                    const __mmask16 mask = __mmask16((1u << min64(W, count - j)) - 1);
                    const __m256i low = _mm256_maskz_loadu_epi16(mask, even + j);
                    const __m256i high = both ? _mm256_maskz_loadu_epi16(mask, odd + j) : _mm256_setzero_si256();
                    _mm512_storeu_si512(out + j, interleave(low, high));
                }
                continue;
            }
#endif
            read_weight(op, c, columns.first + o, count, out);
        }
    }
}

template <class T>
void product_columns(const LinearOp& op, const Shape& shape, const Columns& columns, float* tile) {
    const Panels panels(columns.count);
    float* weight = scratch_of<float>(kWeightSlot, columns.padded * kColumnSteps);
    int64_t first = 0;
    do {
        const int64_t steps = min64(kColumnSteps, shape.steps - first);
        copy_weight_columns(op, shape, columns, first, steps, weight);
        // While these rows of W are multiplied, the next ones are prefetched into L2, a few during each tile.
        const int64_t next_c = (shape.pairs ? 2 : 1) * (first + steps < shape.steps ? first + steps : 0);
        const char* next = op.weight_at(columns.first, next_c);
        const int64_t row_bytes = op.weight_row_bytes();
        const int64_t each = max64(steps / kPrefetchLines, 1);  // rows that the steps of a tile can prefetch
        const int64_t fetches = ceil_div((shape.pairs ? 2 : 1) * steps, each);
        for (int64_t p = 0; p < panels.count(); p++) {
            const int64_t o = panels.first(p), width = panels.width(p) * W, tile_height = tile_rows(panels.width(p));
            const int64_t tiles = ceil_div(shape.rows, tile_height);
            outer<T>(shape.rows, panels.width(p), {static_cast<const T*>(shape.in) + first, shape.in_row, 1},
                     reinterpret_cast<const T*>(weight + o * steps), width, steps, tile + o, columns.padded, first == 0,
                     [&](int64_t i) {
                         // divided evenly among the tiles; rows further on would evict data that is in use
                         const int64_t tile = p * tiles + i / tile_height, all = panels.count() * tiles;
                         const int64_t fetch = tile * fetches / all;
                         if (fetch == (tile - 1) * fetches / all && tile > 0) return Prefetch{next, 0, next, 0};
                         return Prefetch{next, 0, next + fetch * each * row_bytes, row_bytes};
                     });
        }
        first += steps;
    } while (first < shape.steps);
}

// ---- the epilogue -------------------------------------------------------------------------------------------------

// Adds adapters and biases to rows of fp32 results, rounds once and stores.
class Epilogue {
public:
    Epilogue(const LinearOp& op, const Columns& columns) : op_(op), columns_(columns) {
        const int64_t padded = columns.padded;
        float* memory = scratch_of<float>(kFactorSlot, (op.max_rank + 2 + W) * padded);
        bias_ = memory;
        beta_ = bias_ + padded;
        delta_ = beta_ + padded;
        panel_ = delta_ + W * padded;
        if (op.bias) {
            widen(at(op.bias, op.bias_dtype, columns.first), op.bias_dtype, columns.count, bias_);
        } else {
            for (int64_t o = 0; o < padded; o += W) store(bias_ + o, zero());
        }
    }

    // For the lanes form: adds adapters to registers whose W rows all belong to one adapter, in the same way as the
    // product with W: lanes are rows, and B is broadcast. `finish` then skips these. The sums have the same bits.
    void expand_lanes(int64_t first, int64_t rows, float* acc, int64_t acc_row) {
        const int64_t v_row = round_up(rows, W), end = first + rows;
        float* v = scratch_of<float>(kRowsSlot, op_.v_row * v_row);
        for (int64_t i = 0; i < rows; i += W) {
            for (int64_t r = 0; r < op_.v_row; r += W) {
                transpose(op_.v + (first + i) * op_.v_row + r, op_.v_row, v + r * v_row + i, v_row);
            }
        }
        for (adapter_ = 0; adapter_ < op_.adapters.count; adapter_++) {
            const int64_t from = max64(op_.order.begin(adapter_), first), to = min64(op_.order.end(adapter_), end);
            if (from >= to || !fills_registers()) continue;
            // the last register may be filled only in part
            const int64_t last = to == end ? v_row : (to - first) / W * W;
            int64_t lane = round_up(from - first, W);
            if (lane >= last) continue;
            load_adapter();
            load_pages();
            for (int vectors; lane < last; lane += vectors * W) {
                vectors = int(min64(kMaxVectors, (last - lane) / W));
                outer<float>(columns_.count, vectors, {panel_, 1, columns_.padded}, v + lane, v_row, op_.rank(adapter_),
                             acc + lane, acc_row, false);
            }
        }
        adapter_ = -1, loaded_ = false, lanes_done_ = true;
    }

    // In the backward the dropout mask applies only to the adapter's part, so that part has a separate sum, of W rows.
    bool drops() const { return op_.dropout.on && op_.backward; }

    // How many rows `finish` takes at most; whole tiles of the expand, if possible.
    int64_t rows_at_once() const { return drops() ? W : 8 * kRowsOfTwo; }

    // `count` rows at positions from `position` on; `tile` is [count, padded].
    void finish(int64_t position, int64_t count, float* tile) {
        for (int64_t i = 0; i < count;) {
            while (position + i >= op_.order.end(adapter_)) {
                adapter_++;
                loaded_ = false;
            }
            const int64_t segment = min64(count - i, op_.order.end(adapter_) - position - i);
            float* rows = tile + i * columns_.padded;
            if (adapter_ >= 0) {
                if (!loaded_) load_adapter();
                if (is_single_row_) {
                    expand_single(position + i, rows);
                } else if (op_.rank(adapter_) > 0 && !(lanes_done_ && segment == count && fills_registers())) {
                    if (!pages_loaded_) load_pages();
                    expand(position + i, segment, rows);
                }
            }
            for (int64_t j = 0; j < segment; j++) {
                write(op_.order.token(position + i + j), rows + j * columns_.padded);
            }
            i += segment;
        }
    }

private:
    void load_adapter() {
        loaded_ = true, pages_loaded_ = false;
        const int64_t address = op_.backward ? 0 : op_.adapter(adapter_).bias_B;
        const auto* beta = reinterpret_cast<const void*>(address);
        has_beta_ = beta != nullptr;
        if (beta) widen(at(beta, op_.adapters.dtype, columns_.first), op_.adapters.dtype, columns_.count, beta_);
        next_ = adapter_ + 1;
        while (next_ < op_.adapters.count && op_.order.begin(next_) == op_.order.end(next_)) next_++;
        // A single row needs no panel: it uses the ranks as they come out of the transposition.
        is_single_row_ = op_.order.end(adapter_) - op_.order.begin(adapter_) == 1 && !drops() && has_dense_pages();
    }

    // Loads the adapter's rows of Bᵀ (backward: of A) for these columns, [R, padded].
    void load_pages() {
        pages_loaded_ = true;
        for (int64_t page = 0; 16 * page < op_.rank(adapter_); page++) {
            const Factor factor = op_.expand_factor(adapter_, page);
            const int ranks = op_.page_ranks(adapter_, page);
            float* to = panel_ + 16 * page * columns_.padded;
            with_type(op_.adapters.dtype,
                      [&](auto type) { load_page<decltype(type)>(factor, next_factor(page), ranks, to); });
        }
    }

    // Whether `expand_lanes` adds this adapter to registers that its rows fill.
    bool fills_registers() const {
        return op_.rank(adapter_) > 0 && !drops() && op_.order.end(adapter_) - op_.order.begin(adapter_) > 1;
    }

    // Whether the adapter has ranks, and every page is contiguous along its ranks or along the columns.
    bool has_dense_pages() const {
        bool dense = op_.rank(adapter_) > 0;
        for (int64_t page = 0; 16 * page < op_.rank(adapter_); page++) {
            const Factor factor = op_.expand_factor(adapter_, page);
            dense = dense && (factor.rank == 1 || factor.along == 1);
        }
        return dense;
    }

    // The same page of the next adapter if it has one, else of this one again.
    Factor next_factor(int64_t page) const {
        const bool exists = next_ < op_.adapters.count && 16 * page < op_.rank(next_);
        return op_.expand_factor(exists ? next_ : adapter_, page);
    }

    // Prefetches the cache lines of W rows of `ahead`. Many more at once would have to wait for each other.
    template <class T>
    static void fetch_rows(const T* ahead, int64_t along) {
        const int64_t stride = along * int64_t(sizeof(T)), line = stride > 0 && stride < 64 ? 64 / stride : 1;
        for (int64_t i = 0; i < W; i += line) __builtin_prefetch(ahead + i * along, 0, 2);
    }

    template <class T>
    void load_page(const Factor& factor, const Factor& next, int ranks, float* to) {
        const T* from = static_cast<const T*>(factor.data) + columns_.first * factor.along;
        const T* ahead = static_cast<const T*>(next.data) + columns_.first * next.along;
        const int64_t padded = columns_.padded;
        if (factor.along == 1) {
            for (int r = 0; r < ranks; r++) {
                for (int64_t o = 0; o < columns_.count; o += 64 / int64_t(sizeof(T))) {
                    __builtin_prefetch(ahead + r * next.rank + o * next.along, 0, 2);
                }
                widen(from + r * factor.rank, columns_.count, to + r * padded);
            }
        } else if (factor.rank == 1) {
            for (int64_t o = 0; o < columns_.count; o += W) {
                fetch_rows(ahead + o * next.along, next.along);
                const T* rows = from + o * factor.along;
                if (columns_.count - o >= W && ranks % W == 0) {
                    for (int r = 0; r < ranks; r += W) transpose(rows + r, factor.along, to + r * padded + o, padded);
                    continue;
                }
                const auto copy = [&](int i, int64_t s, int n, float* out) {
                    widen(rows + i * factor.along + s, n, out);
                };
                transpose_rows(int(min64(W, columns_.count - o)), ranks, to + o, padded, copy);
            }
        } else {
            for (int r = 0; r < ranks; r++) {
                for (int64_t o = 0; o < columns_.count; o++) {
                    to[r * padded + o] = to_float(from[r * factor.rank + o * factor.along]);
                }
            }
        }
    }

    // The sum of a single row, page by page. If a part of the sum has ranks of several pages, delta_ holds it in
    // between: so the row has the same bits as among other rows of its adapter, whose ranks are in one panel.
    struct PartialSum {
        float *row, *part;
        bool starts, ends;

        Vec begin(int64_t o) const { return starts ? zero() : load(part + o); }
        void end(int64_t o, Vec sum) const {
            if (ends) {
                store(row + o, add(load(row + o), sum));
            } else {
                store(part + o, sum);
            }
        }
    };

    // `expand` for a single row.
    void expand_single(int64_t position, float* row) {
        constexpr int64_t part_pages = OuterPart<float>::kSteps / 16;
        const int64_t pages = ceil_div(op_.rank(adapter_), 16);
        for (int64_t page = 0; page < pages; page++) {
            const float* v = op_.v + position * op_.v_row + 16 * page;
            const Factor factor = op_.expand_factor(adapter_, page), next = next_factor(page);
            const int ranks = op_.page_ranks(adapter_, page);
            const bool ends = (page + 1) % part_pages == 0 || page + 1 == pages;
            const PartialSum sums{row, delta_, page % part_pages == 0, ends};
            with_type(op_.adapters.dtype, [&](auto type) {
                typedef decltype(type) T;
                if (factor.along == 1) {
                    add_page_of_columns<T>(v, factor, next, ranks, sums);
                } else {
                    add_page_of_ranks<T>(v, factor, next, ranks, sums);
                }
            });
        }
    }

    // Adds a page whose columns are contiguous, as in a bank.
    template <class T>
    void add_page_of_columns(const float* v, const Factor& factor, const Factor& next, int ranks,
                             const PartialSum& sums) {
        constexpr int kAtOnce = 4;  // registers of columns: as many chains of fma, and v is read once for all
        const T* from = static_cast<const T*>(factor.data) + columns_.first;
        const T* ahead = static_cast<const T*>(next.data) + columns_.first * next.along;
        int64_t o = 0;
        for (; o + kAtOnce * W <= columns_.count; o += kAtOnce * W) {
            Vec sum[kAtOnce];
#pragma GCC unroll 4
            for (int j = 0; j < kAtOnce; j++) sum[j] = sums.begin(o + j * W);
            for (int r = 0; r < ranks; r++) {
                for (int64_t line = 0; line < kAtOnce * W; line += 64 / int64_t(sizeof(T))) {
                    __builtin_prefetch(ahead + r * next.rank + (o + line) * next.along, 0, 2);
                }
                const Vec value = set1(v[r]);
                const T* row = from + r * factor.rank + o;
#pragma GCC unroll 4
                for (int j = 0; j < kAtOnce; j++) sum[j] = fma(value, load(row + j * W), sum[j]);
            }
#pragma GCC unroll 4
            for (int j = 0; j < kAtOnce; j++) sums.end(o + j * W, sum[j]);
        }
        for (; o < columns_.count; o += W) {
            const int n = int(min64(W, columns_.count - o));
            Vec sum = sums.begin(o);
            for (int r = 0; r < ranks; r++) {
                const T* row = from + r * factor.rank + o;
                sum = fma(set1(v[r]), n == W ? load(row) : load_n(row, n), sum);
            }
            sums.end(o, sum);
        }
    }

    // Adds a page whose ranks are contiguous: it is transposed in registers.
    template <class T>
    void add_page_of_ranks(const float* v, const Factor& factor, const Factor& next, int ranks,
                           const PartialSum& sums) {
        const T* from = static_cast<const T*>(factor.data) + columns_.first * factor.along;
        const T* ahead = static_cast<const T*>(next.data) + columns_.first * next.along;
        for (int64_t o = 0; o < columns_.count; o += W) {
            fetch_rows(ahead + o * next.along, next.along);
            const T* rows = from + o * factor.along;
            Vec sum = sums.begin(o);
            for (int r = 0; r < ranks; r += W) {
                if (columns_.count - o >= W && ranks - r >= W) {
                    Vec transposed[W];
                    transpose(rows + r, factor.along, transposed);
#pragma GCC unroll 16
                    for (int j = 0; j < W; j++) sum = fma(set1(v[r + j]), transposed[j], sum);
                    continue;
                }
                alignas(64) float transposed[W * W];
                const int64_t rest = min64(W, ranks - r);
                const auto copy = [&](int i, int64_t s, int n, float* out) {
                    widen(rows + i * factor.along + r + s, n, out);
                };
                transpose_rows(int(min64(W, columns_.count - o)), rest, transposed, W, copy);
                for (int64_t j = 0; j < rest; j++) sum = fma(set1(v[r + j]), load(transposed + j * W), sum);
            }
            sums.end(o, sum);
        }
    }

    void expand(int64_t position, int64_t count, float* rows) {
        const int64_t padded = columns_.padded, ranks = op_.rank(adapter_);
        float* to = drops() ? delta_ : rows;
        const Operand<float> v{op_.v + position * op_.v_row, op_.v_row, 1};
        const Panels panels(padded);
        for (int64_t p = 0; p < panels.count(); p++) {
            const int64_t o = panels.first(p);
            outer<float>(count, panels.width(p), v, panel_ + o, padded, ranks, to + o, padded, drops());
        }
        if (!drops()) return;
        for (int64_t i = 0; i < count; i++) {
            float* delta = delta_ + i * padded;
            apply_dropout(op_.dropout, op_.order.token(position + i), op_.O, columns_.first, columns_.count, delta);
            for (int64_t o = 0; o < columns_.count; o += W) {
                float* row = rows + i * padded + o;
                store(row, add(load(row), load(delta + o)));
            }
        }
    }

    void write(int64_t m, const float* row) {
        const bool beta = adapter_ >= 0 && has_beta_;
        const auto sum = [&](int64_t o) __attribute__((always_inline)) {
            Vec sum = load(row + o);
            if (op_.bias) sum = add(sum, load(bias_ + o));
            if (beta) sum = add(sum, load(beta_ + o));
            return sum;
        };
        with_type(op_.out_dtype, [&](auto type) {
            auto* out = static_cast<decltype(type)*>(op_.out) + m * op_.out_row + columns_.first;
            int64_t o = 0;
            for (; o + W <= columns_.count; o += W) store(out + o, sum(o));
            if (o < columns_.count) store_n(out + o, sum(o), int(columns_.count - o));
        });
    }

    const LinearOp& op_;
    const Columns columns_;
    int adapter_ = -1, next_ = 0;
    bool loaded_ = false, pages_loaded_ = false, is_single_row_ = false, has_beta_ = false, lanes_done_ = false;
    float *bias_, *beta_, *delta_, *panel_;
};

// Computes one block of output columns that already hold the base layer's part. Rows without an adapter are unchanged.
void add_to_base(const LinearOp& op, const Shape& shape, const Columns& columns, const Latch& shrunk) {
    Epilogue epilogue(op, columns);
    shrunk.wait();
    const int64_t at_once = epilogue.rows_at_once(), end = shape.first_row + shape.rows;
    float* tile = scratch_of<float>(kTileSlot, at_once * columns.padded);
    for (int64_t i = max64(shape.first_row, op.order.end(-1)); i < end; i += at_once) {
        const int64_t count = min64(at_once, end - i);
        for (int64_t j = 0; j < count; j++) {
            const void* base = at(op.out, op.out_dtype, op.order.token(i + j) * op.out_row + columns.first);
            widen(base, op.out_dtype, columns.count, tile + j * columns.padded);
        }
        epilogue.finish(i, count, tile);
    }
}

// Computes one block of output columns, from W to the stored result. Waits for the prepared input before the product,
// and for v only after it.
void compute_block(const LinearOp& op, const Shape& shape, const Columns& columns, const Latch& prepared,
                   const Latch& shrunk) {
    if (shape.form == kOverBase) return add_to_base(op, shape, columns, shrunk);
    const int64_t padded = columns.padded;
    Epilogue epilogue(op, columns);
    prepared.wait();
    if (shape.form == kLanes) {
        const int64_t acc_row = round_up(shape.rows, W) + kPad;
        float* acc = scratch_of<float>(kAccumulatorSlot, padded * acc_row);
        if (shape.pairs) {
#ifdef PEFTK_DP
            product_lanes<Pair>(op, shape, columns, acc, acc_row);
#endif
        } else {
#if defined(PEFTK_FEW_ROWS)
            product_few(op, shape.rows, static_cast<const float*>(shape.in), columns, acc, acc_row);
#elif !defined(PEFTK_PANELS)
            product_lanes<float>(op, shape, columns, acc, acc_row);
#endif
        }
        shrunk.wait();
        if (op.max_rank > 0) epilogue.expand_lanes(shape.first_row, shape.rows, acc, acc_row);
        float* tile = scratch_of<float>(kTileSlot, W * padded);
        for (int64_t i = 0; i < shape.rows; i += W) {
            for (int64_t o = 0; o < padded; o += W) transpose(acc + o * acc_row + i, acc_row, tile + o, padded);
            epilogue.finish(shape.first_row + i, min64(W, shape.rows - i), tile);
        }
        return;
    }
    float* tile = scratch_of<float>(kTileSlot, shape.rows * padded);
    if (shape.form == kPanels) {
#ifdef PEFTK_PANELS
        product_panels(op, PackedRows(op, shape.in, shape.rows), columns, tile);
#endif
    } else if (shape.form == kDot) {
        product_dot(op, shape, columns, tile);
    } else if (shape.form == kTransposed) {
        product_transposed(op, shape, columns, tile);
    } else if (shape.pairs) {
#ifdef PEFTK_DP
        product_columns<Pair>(op, shape, columns, tile);
#endif
    } else if constexpr (!kHavePanels) {
        product_columns<float>(op, shape, columns, tile);
    }
    shrunk.wait();
    const int64_t at_once = epilogue.rows_at_once();
    for (int64_t i = 0; i < shape.rows; i += at_once) {
        epilogue.finish(shape.first_row + i, min64(at_once, shape.rows - i), tile + i * padded);
    }
}

bool takes_pairs(const LinearOp& op) { return kHavePairs && op.in_dtype == kBFloat16 && op.weight_dtype == kBFloat16; }

Form form_of(const LinearOp& op) {
    if (op.over_base) return kOverBase;
    // In batch-invariant mode few rows of a packed W take the form of many.
    const int64_t most = op.batch_invariant       ? (op.packed() ? 0 : kTransposedTokens)
                         : op.weight_bytes() == 4 ? kDotTokens32
                                                  : kDotTokens16;
    if (op.weight_c == 1 && op.M <= most) return op.batch_invariant ? kTransposed : kDot;
    if (!kHavePanels || takes_pairs(op)) return op.weight_c == 1 ? kLanes : kColumns;
    return are_few(op) ? kLanes : kPanels;
}

// Columns of a task: many, to reuse what a task loads, but few enough to balance the tasks among the threads.
int64_t block_columns(const LinearOp& op, Form form, int threads) {
    const int64_t least = form == kDot ? kDotRows : form == kLanes ? kBlockRows / 8 : form == kPanels ? 2 * W : W;
    // columns form: kPrefetchLines cache lines of a row of W, and a tile [rows, columns] that fits into L2
    int64_t columns = form == kDot          ? (op.packed() ? 64 : 16) * kDotRows
                      : form == kLanes      ? op.blocking.blocks * kBlockRows
                      : form == kTransposed ? 6 * W
                      : form == kPanels     ? panel_columns(op)
                      : form == kOverBase   ? kBaseColumns
                                            : kPrefetchLines * 64 / op.weight_bytes() / (op.M > 256 ? 2 : 1);
    // Rows of adapters of their own: each task begins with every adapter anew, and reads longer pieces of their
    // factors.
    if (op.adapters.count > 1 && op.M <= 8 * int64_t(op.adapters.count)) columns *= 4;
    while (threads > 1 && columns > least && ceil_div(op.O, columns) < 4 * int64_t(threads))
        columns = round_up(columns / 2, least);
    return columns;
}

// Divides `rows` rows from `first` on into groups for the shrink. Returns their number, at most one per row.
int64_t make_groups(const LinearOp& op, int64_t first, int64_t rows, Group* groups) {
    int64_t count = 0;
    for (int32_t a = 0; a < op.adapters.count; a++) {
        if (op.rank(a) == 0 || (!op.wants_v(a) && !op.wants_w(a))) continue;
        const int64_t end = min64(op.order.end(a), first + rows);
        for (int64_t i = max64(op.order.begin(a), first); i < end; i += kDotTokens) {
            groups[count++] = {a, int32_t(min64(kDotTokens, end - i)), i};
        }
    }
    return count;
}

// Runs the operation for rows that share a pass over W.
void run_rows(const LinearOp& op, int64_t first, int64_t rows, int threads) {
    Shape shape;
    shape.pairs = takes_pairs(op);
    shape.form = form_of(op);
    shape.steps = shape.pairs ? ceil_div(op.C, 2) : op.C;
    shape.in_row = round_up(shape.steps, 2 * W) + kPad;
    shape.first_row = first;
    shape.rows = rows;

    Group* groups = nullptr;
    int64_t group_count = 0, page_runs = 1;
    if (op.max_rank > 0) {
        groups = scratch_of<Group>(kGroupsSlot, rows);
        group_count = make_groups(op, first, rows, groups);
        // With few groups, several threads share the ranks of a group, and each of them widens the group's rows. Not
        // with dropout, where each would also compute the mask.
        if (!op.dropout.on && group_count < 4 * int64_t(threads) && threads > 1) page_runs = ceil_div(op.max_rank, 16);
    }
    const bool in_place = !op.out || shape.form == kOverBase || (shape.form == kDot && shape.pairs);
    const int64_t preparations = in_place ? 0 : ceil_div(rows, prepared_rows(op, shape));
    if (!in_place) {
        const int64_t row = shape.form == kLanes || shape.form == kPanels ? shape.steps : shape.in_row;
        shape.in = scratch_of<float>(kInputSlot, round_up(rows, W) * row);
    }
    const int64_t shrinks = group_count * page_runs, step = block_columns(op, shape.form, threads);
    const int64_t blocks = op.out ? ceil_div(op.O, step) : 0;
    Latch prepared(preparations), shrunk(shrinks);
    auto body = [&](int64_t task) {
        if (task < preparations) {
            const Latch::CountOnExit part(prepared);
            return prepare(op, shape, task);
        }
        task -= preparations;
        if (task < shrinks) {
            const Latch::CountOnExit part(shrunk);
            const Group& group = groups[task / page_runs];
            const Group& after = groups[min64(task / page_runs + 1, group_count - 1)];
            const int64_t pages = ceil_div(op.rank(group.adapter), 16), run = task % page_runs;
            if (page_runs == 1) return shrink(op, group, after, 0, pages);
            if (run < pages) shrink(op, group, after, run, run + 1);
            return;
        }
        Columns columns;
        columns.first = (task - shrinks) * step;
        columns.count = min64(step, op.O - columns.first);
        columns.padded = round_up(columns.count, W);
        compute_block(op, shape, columns, prepared, shrunk);
    };
    parallel_for(preparations + shrinks + blocks, threads, body);
}

}  // namespace

void run(const LinearOp& op) {
    if (op.M == 0) return;
    const int64_t share = round_up(ceil_div(op.M, op.threads), W);
    const int64_t shared_bytes = op.out && !op.over_base ? op.O * op.C * op.weight_bytes() : 0;
    // For its own rows, every thread would pack all of W, or decode it.
    const bool packs_weight = form_of(op) == kPanels || (op.packed() && shared_bytes > 0);
    if (op.threads > 1 && !packs_weight && share >= kMinRowsPerThread && shared_bytes <= kMaxWeightPerThread) {
        // Every thread has enough rows of its own. It prepares its own input, so that only W, which is only read, moves
        // between the cores' caches.
        auto own = [&](int64_t task) {
            for (int64_t first = task * share; first < min64(op.M, (task + 1) * share); first += op.blocking.rows) {
                run_rows(op, first, min64(op.blocking.rows, min64(op.M, (task + 1) * share) - first), 1);
            }
        };
        return parallel_for(ceil_div(op.M, share), op.threads, own);
    }
    for (int64_t first = 0; first < op.M; first += op.blocking.rows) {
        run_rows(op, first, min64(op.blocking.rows, op.M - first), op.threads);
    }
}

void lora_linear(const LinearArgs& args, const Order& order) { run(forward_op(args, order)); }

void lora_linear_plan(const Linear& linear, bool backward, Plan* plan) {
    LinearOp op{};
    op.M = linear.M, op.O = backward ? linear.K : linear.N;
    op.in_dtype = linear.x_dtype, op.weight_dtype = linear.weight_dtype, op.packing = linear.packing;
    op.weight_c = backward ? linear.weight_n : linear.weight_k;
    op.batch_invariant = linear.batch_invariant, op.blocking = blocking_in_use();
    op.threads = useful_threads(product_work(linear), linear.threads);
    const char* names[] = {"dot", "lanes", "columns", "panels", "transposed"};
    const Form form = form_of(op);
    *plan = {names[form], takes_pairs(op), int(min64(op.threads, ceil_div(op.O, block_columns(op, form, op.threads))))};
}

}  // namespace PEFTK_LEVEL
}  // namespace peftk
