// The panels form of the product: lanes are columns of the result, and both operands are packed.
//
// The input is packed once a call, in tiles of up to kPanelRows rows: [steps, rows of the tile]. A task packs its part
// of W, a few hundred steps of the contraction at a time, in panels of two registers: [steps, 2W], where W is
// transposed if it is contiguous along the contraction. So a tile reads two streams of consecutive memory, and constant
// offsets from them.
//
// Sums have two levels, as in `outer`; a part is longer where the contraction is longer (`panel_part`).
#pragma once

#include <type_traits>

#include "cpu/kernels/linear.h"
#include "cpu/kernels/packed.h"
#include "cpu/kernels/transposed.h"

namespace peftk {
namespace PEFTK_LEVEL {

// Whether a row of W in memory is a column of the result. Otherwise it is a step of the contraction.
static inline bool along_contraction(const LinearOp& op) { return op.weight_c == 1; }

constexpr int64_t kPanelWidth = 2 * W;
constexpr int64_t kPanelChunk = 32;                // steps in which a tile prefetches one chunk of consecutive lines:
constexpr int64_t kChunkBytes = 16 * kPanelChunk;  // a line every 4 steps

// Steps that a task packs and multiplies at a time: a panel stays in L1. In batch-invariant mode the parts of such a
// block are all as long as its first one, which holds for 256.
static inline int64_t panel_steps(const LinearOp& op) { return op.batch_invariant ? 256 : op.blocking.steps; }

// The product for at most kStreamedRows rows where W is contiguous along the columns: nothing of W is used often enough
// to be packed. A few rows of W at a time are added to the sums, in place. The sums of a part begin at zero and
// are then added to the total, as in panel_tile.
constexpr int64_t kStreamedRows = 8, kStreamedTile = 4;

static inline bool is_streamed(const LinearOp& op) {
    return !along_contraction(op) && !op.packed() && op.M <= kStreamedRows;
}

// Rows of a tile of the packed input, at most.
static inline int64_t tile_height(const LinearOp& op) { return is_streamed(op) ? kStreamedTile : kPanelRows; }

// Columns of a task. Where W is contiguous along them they are many, to read much of each row of W at a time.
static inline int64_t panel_columns(const LinearOp& op) {
    if (along_contraction(op)) return op.blocking.blocks * 2 * kPanelWidth;
    const int64_t element = op.weight_bytes();
    if (is_streamed(op)) return (op.M <= 4 ? 4096 : 2048) / element;
    return op.blocking.blocks * 1024 / element / (op.M <= 32 ? 1 : op.M <= 64 ? 2 : 4);
}

// Steps of the part that begins at step `first`. docs/cpu.md has the errors.
static inline int64_t panel_part(const LinearOp& op, int64_t first) {
    if (op.batch_invariant && along_contraction(op)) return invariant_part(op.C, false, first);
    return op.C < 128 ? 32 : op.C < 512 ? 64 : op.C < 2048 ? 128 : 256;
}

// The tiles of at most `most` rows that `rows` rows are divided into: of about the same height, since a low tile has
// too few sums to hide the latency of fma. The first ones are one row higher than the others.
struct RowTiles {
    int64_t rows, count, height, higher;

    explicit RowTiles(int64_t rows, int64_t most)
        : rows(rows), count(ceil_div(rows, most)), height(count ? rows / count : 0), higher(rows - count * height) {}
    int64_t first(int64_t tile) const { return tile * height + min64(tile, higher); }
};

// Chunks of cache lines that are read later. With every chunk the one `second` bytes further on comes too; it is
// `next` bytes to the next.
struct PanelAhead {
    const char* line;
    int64_t second, next;
};

template <int kRows, int kVectors>
PEFTK_TILE void panel_tile(const float* b, const float* l, int64_t steps, int64_t part, float* c, int64_t c_row,
                           bool fresh, PanelAhead ahead) {
    Vec acc[kRows][kVectors];
    const auto step = [&]() __attribute__((always_inline)) {
        Vec lanes[kVectors];
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; v++) lanes[v] = load_once(l + v * W);
#pragma GCC unroll 16
        for (int i = 0; i < kRows; i++) {
            const Vec value = set1(b[i]);
#pragma GCC unroll 2
            for (int v = 0; v < kVectors; v++) fma_in_place(acc[i][v], value, lanes[v]);
        }
        b += kRows;
        l += kVectors * W;
    };
    for (; steps > 0; steps -= part, fresh = false) {
        // every loop over the tile must be unrolled, since a variable index would put the tile into memory
#pragma GCC unroll 16
        for (int i = 0; i < kRows; i++) {
#pragma GCC unroll 2
            for (int v = 0; v < kVectors; v++) acc[i][v] = zero();
        }
        const int64_t end = min64(part, steps);
        for (int64_t chunk = end / kPanelChunk; chunk > 0; chunk--, ahead.line += ahead.next) {
            for (int s = 0; s < kPanelChunk / 4; s++) {
                __builtin_prefetch(ahead.line + 64 * s, 0, 2);
                __builtin_prefetch(ahead.line + 64 * s + ahead.second, 0, 2);
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++) step();
            }
        }
        for (int64_t s = end % kPanelChunk; s > 0; s--) step();
        asm volatile("" : "+r"(c)::"memory");  // the totals are in memory, not in registers that the loop needs
#pragma GCC unroll 16
        for (int i = 0; i < kRows; i++) {
#pragma GCC unroll 2
            for (int v = 0; v < kVectors; v++) {
                float* total = c + i * c_row + v * W;
                store(total, fresh ? acc[i][v] : add(load(total), acc[i][v]));
            }
        }
    }
}

template <int kRows, int kVectors>
static void panel_rows(int64_t rows, const float* b, const float* l, int64_t steps, int64_t part, float* c,
                       int64_t c_row, bool fresh, PanelAhead ahead) {
    if (rows == kRows) {
        panel_tile<kRows, kVectors>(b, l, steps, part, c, c_row, fresh, ahead);
    } else if constexpr (kRows > 1) {
        panel_rows<kRows - 1, kVectors>(rows, b, l, steps, part, c, c_row, fresh, ahead);
    }
}

// The packed input, in blocks of panel_steps steps; a block has its tiles one after the other.
struct PackedRows {
    float* data;
    RowTiles tiles;
    int64_t block_steps;

    PackedRows(const LinearOp& op, void* data, int64_t rows)
        : data(static_cast<float*>(data)), tiles(rows, tile_height(op)), block_steps(panel_steps(op)) {}

    // Where the block begins that has `steps` steps from `first` on.
    float* at(int64_t tile, int64_t first, int64_t steps) const {
        return data + first * tiles.rows + steps * tiles.first(tile);
    }
};

// Packs one tile of `count` rows of C elements; rows has W addresses, of which the first `count` are used.
template <class T>
static void pack_tile(const T* const* rows, int64_t count, int64_t C, const PackedRows& packed, int64_t tile) {
    for (int64_t first = 0; first < C; first += packed.block_steps) {
        const int64_t steps = min64(packed.block_steps, C - first);
        float* to = packed.at(tile, first, steps);
        for (int64_t s = 0; s < steps; s += W) {
            const int64_t n = min64(W, steps - s);
            Vec columns[W];
            transpose_rows_of(rows, first + s, int(n), columns);
            // A store writes W lanes; the next ones overwrite those beyond `count`. At the end none may be beyond the
            // tile.
            const int64_t whole = steps * count < W ? 0 : min64(n, max64(0, (steps * count - W) / count + 1 - s));
#pragma GCC unroll 16
            for (int64_t j = 0; j < W; j++) {
                if (j < whole) store(to + (s + j) * count, columns[j]);
            }
#pragma GCC unroll 16
            for (int64_t j = 0; j < W; j++) {
                if (j >= whole && j < n) store_n(to + (s + j) * count, columns[j], int(count));
            }
        }
    }
}

// Packs one panel of an operand that is contiguous along the contraction: `count` columns, `along` elements from one to
// the next, to [steps, width].
template <class T>
static void pack_transposed(const T* data, int64_t along, int64_t count, int64_t steps, int64_t width, float* to) {
    for (int64_t j = 0; j < width; j += W) {
        const T* rows[W];
        for (int64_t i = 0; i < W; i++) rows[i] = data + min64(j + i, count - 1) * along;
        int64_t s = 0;
        if constexpr (std::is_same<T, bf16>::value) {  // two at a time, which takes half the shuffles
            for (; s + 2 * W <= steps; s += 2 * W) {
                Vec pairs[W];
                transpose_pairs_of(rows, s, pairs);
#pragma GCC unroll 16
                for (int64_t i = 0; i < W; i++) {
                    store(to + (s + 2 * i) * width + j, widen_even(pairs[i]));
                    store(to + (s + 2 * i + 1) * width + j, widen_odd(pairs[i]));
                }
            }
        }
        for (; s < steps; s += W) {
            const int64_t n = min64(W, steps - s);
            Vec columns[W];
            transpose_rows_of(rows, s, int(n), columns);
#pragma GCC unroll 16
            for (int64_t i = 0; i < W; i++) {
                if (i < n) store(to + (s + i) * width + j, columns[i]);
            }
        }
    }
}

// Packs one panel of an operand that is contiguous along its columns: `count` columns, `along` elements from one step
// to the next, to [steps, width].
template <class T>
static void pack_copied(const T* data, int64_t along, int64_t count, int64_t steps, int64_t width, float* to) {
    for (int64_t s = 0; s < steps; s++, data += along, to += width) {
        for (int64_t o = 0; o < width; o += W) {
            store(to + o, count - o >= W ? load(data + o) : load_n(data + o, int(count - o)));
        }
    }
}

// Packs the input's rows of one tile; first_row is the position of the block's first row.
static void pack_rows(const LinearOp& op, const PackedRows& packed, int64_t first_row, int64_t tile) {
    const int64_t first = packed.tiles.first(tile), count = packed.tiles.first(tile + 1) - first;
    with_type(op.in_dtype, [&](auto type) {
        typedef decltype(type) T;
        const T* rows[W];
        for (int64_t i = 0; i < W; i++) {
            rows[i] =
                static_cast<const T*>(op.in) + op.order.token(first_row + first + min64(i, count - 1)) * op.in_row;
        }
        pack_tile(rows, count, op.C, packed, tile);
    });
}

// sums [kRows, row] += b [kStep, kRows] times kStep rows of W, `along` elements from one to the next.
template <int kRows, int kStep, class T>
PEFTK_TILE void stream_rows(const float* b, const T* w, int64_t along, int64_t count, float* sums, int64_t row) {
    Vec values[kStep][kRows];
#pragma GCC unroll 16
    for (int s = 0; s < kStep; s++) {
#pragma GCC unroll 16
        for (int i = 0; i < kRows; i++) values[s][i] = set1(b[s * kRows + i]);
    }
    const auto add = [&](int64_t o, auto load_row) __attribute__((always_inline)) {
        Vec sum[kRows];
#pragma GCC unroll 16
        for (int i = 0; i < kRows; i++) sum[i] = load(sums + i * row + o);
#pragma GCC unroll 16
        for (int s = 0; s < kStep; s++) {
            const Vec lanes = load_row(w + s * along + o);
#pragma GCC unroll 16
            for (int i = 0; i < kRows; i++) sum[i] = fma(values[s][i], lanes, sum[i]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < kRows; i++) store(sums + i * row + o, sum[i]);
    };
    int64_t o = 0;
    for (; o + W <= count; o += W) {
        if (o * int64_t(sizeof(T)) % 64 == 0) {
#pragma GCC unroll 16
            for (int s = 0; s < kStep; s++) __builtin_prefetch(w + (s + kStep) * along + o, 0, 2);
        }
        add(o, [](const T* p) { return load(p); });
    }
    if (const int rest = int(count - o)) add(o, [rest](const T* p) { return load_n(p, rest); });
}

// The same for a tile of `rows` rows.
template <int kRows, int kStep, class T>
static void stream_tile(int64_t rows, const float* b, const T* w, int64_t along, int64_t count, float* sums,
                        int64_t row) {
    if (rows == kRows) {
        stream_rows<kRows, kStep>(b, w, along, count, sums, row);
    } else if constexpr (kRows > 1) {
        stream_tile<kRows - 1, kStep>(rows, b, w, along, count, sums, row);
    }
}

// kStep: rows of W at a time. Registers hold its values of all rows of a tile of the input.
template <int kStep, class T>
static void stream(const LinearOp& op, const PackedRows& packed, const Columns& columns, float* total) {
    constexpr int kMost = 8 / kStep < kStreamedTile ? 8 / kStep : kStreamedTile;
    const int64_t part = panel_part(op, 0), row = columns.padded, size = packed.tiles.rows * row;
    const T* w = static_cast<const T*>(op.weight) + columns.first * op.weight_o;
    float* sums = scratch_of<float>(kWeightSlot, size);
    if (op.C == 0) memset(total, 0, size_t(size) * sizeof(float));
    for (int64_t first = 0; first < op.C; first += part) {
        memset(sums, 0, size_t(size) * sizeof(float));
        const int64_t end = min64(first + part, op.C), block = first / panel_steps(op) * panel_steps(op);
        const int64_t steps = min64(panel_steps(op), op.C - block);
        for (int64_t s = first; s < end;) {
            const bool all = end - s >= kStep;
            const auto add_rows = all ? stream_tile<kMost, kStep, T> : stream_tile<kMost, 1, T>;
            for (int64_t t = 0; t < packed.tiles.count; t++) {
                const int64_t i = packed.tiles.first(t), rows = packed.tiles.first(t + 1) - i;
                add_rows(rows, packed.at(t, block, steps) + (s - block) * rows, w + s * op.weight_c, op.weight_c,
                         columns.count, sums + i * row, row);
            }
            s += all ? kStep : 1;
        }
        for (int64_t i = 0; i < size; i += W) {
            store(total + i, first == 0 ? load(sums + i) : add(load(total + i), load(sums + i)));
        }
    }
}

static void product_streamed(const LinearOp& op, const PackedRows& packed, const Columns& columns, float* tile) {
    with_type(op.weight_dtype, [&](auto type) {
        typedef decltype(type) T;
        switch (packed.tiles.rows) {
            case 1: return stream<8, T>(op, packed, columns, tile);
            case 2: return stream<4, T>(op, packed, columns, tile);
            default: return stream<2, T>(op, packed, columns, tile);
        }
    });
}

// Packs the panel of W that begins at the block's column o, steps first … first + steps - 1.
static void pack_panel(const LinearOp& op, const Columns& columns, int64_t o, int64_t first, int64_t steps, float* to) {
    const int64_t count = min64(kPanelWidth, columns.count - o), width = round_up(count, W);
    if (op.packed()) {
        if (!along_contraction(op)) {
            for (int64_t s = 0; s < steps; s++) read_weight(op, first + s, columns.first + o, count, to + s * width);
            return;
        }
        const int64_t row = round_up(steps, W) + W;  // W more, against cache-set conflicts
        float* decoded = scratch_of<float>(kDecodedSlot, count * row);
        for (int64_t i = 0; i < count; i++) read_weight(op, columns.first + o + i, first, steps, decoded + i * row);
        return pack_transposed(decoded, row, count, steps, width, to);
    }
    with_type(op.weight_dtype, [&](auto type) {
        typedef decltype(type) T;
        const T* data = static_cast<const T*>(op.weight) + (columns.first + o) * op.weight_o + first * op.weight_c;
        if (along_contraction(op)) return pack_transposed(data, op.weight_o, count, steps, width, to);
        pack_copied(data, op.weight_c, count, steps, width, to);
    });
}

// What comes into L2 while `tiles` tiles are multiplied with the steps from `first` to `end`: the next steps of the
// columns, or the next columns' first steps, in chunks. A tile fetches one or two of them every kPanelChunk steps.
class NextSteps {
public:
    NextSteps(const LinearOp& op, const Columns& columns, int64_t first, int64_t end, int64_t tiles) : tiles_(tiles) {
        const int64_t step = end < op.C ? end : 0;
        const int64_t column = columns.first + (step ? 0 : columns.count);
        data_ = op.weight_at(column, step);
        const bool along = along_contraction(op);
        row_ = op.weight_row_bytes();
        rows_ = along ? columns.count : panel_steps(op);
        const int64_t elements = along ? panel_steps(op) : columns.count;
        chunks_ = rows_ * ceil_div(op.bytes_in_row(elements), kChunkBytes);
        at_once_ = tiles * ((end - first) / kPanelChunk) < chunks_ ? 2 : 1;
    }

    // The share of tile number `tile`.
    PanelAhead share(int64_t tile) const {
        const int64_t chunk = tile * chunks_ / tiles_;
        const bool any = chunk < (tile + 1) * chunks_ / tiles_;
        return {data_ + chunk % rows_ * row_ + chunk / rows_ * kChunkBytes, (at_once_ - 1) * row_,
                any ? at_once_ * row_ : 0};
    }

private:
    const char* data_;
    int64_t row_, rows_, chunks_, tiles_, at_once_;  // bytes from row to row; rows; chunks of all rows
};

// tile [rows, padded] = the packed input times the block's columns of W.
static void product_panels(const LinearOp& op, const PackedRows& packed, const Columns& columns, float* tile) {
    if (is_streamed(op)) return product_streamed(op, packed, columns, tile);
    const int64_t panels = ceil_div(columns.count, kPanelWidth), padded = columns.padded;
    const int64_t rows_at_once = max64(1, op.blocking.l2_rows / kPanelRows);
    const RowTiles& tiles = packed.tiles;
    // A panel is kept if other rows want it again; if not, the next one takes its place, which is in L1.
    const int64_t size = kPanelWidth * panel_steps(op), keep = tiles.count > rows_at_once ? size : 0;
    float* weight = scratch_of<float>(kWeightSlot, (panels - 1) * keep + size);
    if (op.C == 0) memset(tile, 0, size_t(tiles.rows * padded) * sizeof(float));
    for (int64_t first = 0; first < op.C; first += panel_steps(op)) {
        const int64_t steps = min64(panel_steps(op), op.C - first), part = panel_part(op, first);
        const NextSteps next(op, columns, first, first + steps, panels * tiles.count);
        int64_t done = 0;
        for (int64_t low = 0; low < tiles.count; low += rows_at_once) {
            for (int64_t p = 0; p < panels; p++) {
                const int64_t o = p * kPanelWidth;
                if (low == 0) pack_panel(op, columns, o, first, steps, weight + p * keep);
                const auto multiply = padded - o >= kPanelWidth ? panel_rows<kPanelRows, 2> : panel_rows<kPanelRows, 1>;
                for (int64_t t = low; t < min64(low + rows_at_once, tiles.count); t++, done++) {
                    const int64_t row = tiles.first(t);
                    multiply(tiles.first(t + 1) - row, packed.at(t, first, steps), weight + p * keep, steps, part,
                             tile + row * padded + o, padded, first == 0, next.share(done));
                }
            }
        }
    }
}

}  // namespace PEFTK_LEVEL
}  // namespace peftk
