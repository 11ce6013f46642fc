// The panels form of the product: lanes are columns of the result, and both operands are packed.
//
// The input is packed once a call, in tiles of up to kRowsOfTwo rows: [steps, rows of the tile]. A task packs its part
// of W, 256 or 64 steps of the contraction at a time, in panels of two registers: [steps, 2W], where W is transposed if
// it is contiguous along the contraction. So a tile reads two streams of consecutive memory, and constant offsets from
// them.
//
// Sums have two levels, as in `outer`; a part is longer where the contraction is longer (`panel_part`).
#pragma once

#include "cpu/kernels/linear.h"

namespace peftk {
namespace PEFTK_LEVEL {

constexpr int64_t kPanelRows = 144;  // rows of the packed input that stay in L2 for all panels of a task
constexpr int64_t kPanelWidth = 2 * W;
constexpr int64_t kPanelChunk = 32;                // steps in which a tile prefetches one chunk of consecutive lines:
constexpr int64_t kChunkBytes = 16 * kPanelChunk;  // a line every 4 steps

// Steps that a task packs and multiplies at a time. Where W is contiguous along the contraction, a panel of 256 steps
// stays in L1. Where it is contiguous along the columns, a task has many columns, to read much of each row of W at a
// time, and all its panels stay in L2.
static inline int64_t panel_steps(bool across) { return across ? 256 : 64; }

// The product for at most kStreamedRows rows where W is contiguous along the columns: nothing of W is used often enough
// to be packed. A few rows of W at a time are added to the sums, in place. The sums of a part begin at zero and are
// then added to the tile, as in panel_tile.
constexpr int64_t kStreamedRows = kRowsOfTwo;  // a single tile

static inline bool is_streamed(bool across, int64_t rows) { return !across && rows <= kStreamedRows; }

// Columns of a task.
static inline int64_t panel_columns(bool across, int64_t rows, int64_t element) {
    if (across) return 2 * kPanelWidth;
    if (is_streamed(across, rows)) return (rows <= 4 ? 4096 : 2048) / element;
    return 1024 / element / (rows <= 32 ? 1 : rows <= 64 ? 2 : 4);
}

// Steps of a part for a contraction over C, if the task has so many at a time. docs/cpu.md has the errors.
static inline int64_t panel_part(int64_t C) { return C < 128 ? 32 : C < 512 ? 64 : C < 2048 ? 128 : 256; }

// The tiles that `rows` rows are divided into: of about the same height, since a low tile has too few sums to hide the
// latency of fma. The first ones are one row higher than the others.
struct RowTiles {
    int64_t rows, count, height, higher;

    explicit RowTiles(int64_t rows)
        : rows(rows),
          count(ceil_div(rows, kRowsOfTwo)),
          height(count ? rows / count : 0),
          higher(rows - count * height) {}
    int64_t first(int64_t tile) const { return tile * height + min64(tile, higher); }
};

// Consecutive chunks of cache lines, `next` bytes from one to the next, that the next tiles read.
struct PanelAhead {
    const char* line;
    int64_t next;
};

template <int kRows, int kVectors>
PEFTK_TILE void panel_tile(const float* b, const float* l, int64_t steps, int64_t part, float* c, int64_t c_row,
                           bool fresh, PanelAhead ahead) {
    Vec acc[kRows][kVectors];
    const auto step = [&]() __attribute__((always_inline)) {
        Vec lanes[kVectors];
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; v++) lanes[v] = load_once(l + v * W);
#pragma GCC unroll 8
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
#pragma GCC unroll 8
        for (int i = 0; i < kRows; i++) {
#pragma GCC unroll 2
            for (int v = 0; v < kVectors; v++) acc[i][v] = zero();
        }
        const int64_t end = min64(part, steps);
        for (int64_t chunk = end / kPanelChunk; chunk > 0; chunk--, ahead.line += ahead.next) {
            for (int s = 0; s < kPanelChunk / 4; s++) {
                __builtin_prefetch(ahead.line + 64 * s, 0, 2);
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++) step();
            }
        }
        for (int64_t s = end % kPanelChunk; s > 0; s--) step();
        asm volatile("" : "+r"(c)::"memory");  // the totals are in memory, not in registers that the loop needs
#pragma GCC unroll 8
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

// The packed input, in blocks of `block` steps; a block has its tiles one after the other.
struct PackedRows {
    float* data;
    RowTiles tiles;
    int64_t block;

    PackedRows(void* data, int64_t rows, bool across)
        : data(static_cast<float*>(data)), tiles(rows), block(panel_steps(across)) {}

    // Where the block begins that has `steps` steps from `first` on.
    float* at(int64_t tile, int64_t first, int64_t steps) const {
        return data + first * tiles.rows + steps * tiles.first(tile);
    }
};

// Packs one tile of `count` rows of C elements; rows has W addresses, of which the first `count` are used.
template <class T>
static void pack_tile(const T* const* rows, int64_t count, int64_t C, const PackedRows& packed, int64_t tile) {
    for (int64_t first = 0; first < C; first += packed.block) {
        const int64_t steps = min64(packed.block, C - first);
        float* to = packed.at(tile, first, steps);
        for (int64_t s = 0; s < steps; s += W) {
            const int64_t n = min64(W, steps - s);
            Vec columns[W];
            transpose_rows_of(rows, first + s, int(n), columns);
            // A store writes W lanes; the next ones overwrite those beyond `count`. At the end none may be beyond the
            // tile.
            const int64_t whole = steps * count < W ? 0 : min64(n, max64(0, (steps * count - W) / count + 1 - s));
#pragma GCC unroll 8
            for (int64_t j = 0; j < W; j++) {
                if (j < whole) store(to + (s + j) * count, columns[j]);
            }
#pragma GCC unroll 8
            for (int64_t j = 0; j < W; j++) {
                if (j >= whole && j < n) store_n(to + (s + j) * count, columns[j], int(count));
            }
        }
    }
}

// Packs one panel of an operand that is contiguous along the contraction: `count` columns, `along` elements from one to
// the next, to [steps, width].
template <class T>
static void pack_panel(const T* data, int64_t along, int64_t count, int64_t steps, int64_t width, float* to) {
    for (int64_t j = 0; j < width; j += W) {
        const T* rows[W];
        for (int64_t i = 0; i < W; i++) rows[i] = data + min64(j + i, count - 1) * along;
        for (int64_t s = 0; s < steps; s += W) {
            const int64_t n = min64(W, steps - s);
            Vec columns[W];
            transpose_rows_of(rows, s, int(n), columns);
#pragma GCC unroll 8
            for (int64_t i = 0; i < W; i++) {
                if (i < n) store(to + (s + i) * width + j, columns[i]);
            }
        }
    }
}

// Packs the panels of an operand that is contiguous along its columns: `count` columns, `along` elements from one step
// to the next. Panel p begins at to + p * size.
template <class T>
static void pack_panels_across(const T* data, int64_t along, int64_t count, int64_t steps, float* to, int64_t size) {
    for (int64_t s = 0; s < steps; s++) {
        const T* from = data + s * along;
        for (int64_t o = 0; o < count; o += W) {
            const int64_t in_panel = o % kPanelWidth, first = o - in_panel;
            const int64_t width = min64(kPanelWidth, round_up(count - first, W));
            store(to + first / kPanelWidth * size + s * width + in_panel,
                  count - o >= W ? load(from + o) : load_n(from + o, int(count - o)));
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
#pragma GCC unroll 8
    for (int s = 0; s < kStep; s++) {
#pragma GCC unroll 8
        for (int i = 0; i < kRows; i++) values[s][i] = set1(b[s * kRows + i]);
    }
    const auto add = [&](int64_t o, auto load_row) __attribute__((always_inline)) {
        Vec sum[kRows];
#pragma GCC unroll 8
        for (int i = 0; i < kRows; i++) sum[i] = load(sums + i * row + o);
#pragma GCC unroll 8
        for (int s = 0; s < kStep; s++) {
            const Vec lanes = load_row(w + s * along + o);
#pragma GCC unroll 8
            for (int i = 0; i < kRows; i++) sum[i] = fma(values[s][i], lanes, sum[i]);
        }
#pragma GCC unroll 8
        for (int i = 0; i < kRows; i++) store(sums + i * row + o, sum[i]);
    };
    int64_t o = 0;
    for (; o + W <= count; o += W) {
        if (o * int64_t(sizeof(T)) % 64 == 0) {
#pragma GCC unroll 8
            for (int s = 0; s < kStep; s++) __builtin_prefetch(w + (s + kStep) * along + o, 0, 2);
        }
        add(o, [](const T* p) { return load(p); });
    }
    if (const int rest = int(count - o)) add(o, [rest](const T* p) { return load_n(p, rest); });
}

template <int kRows, class T>
static void stream(const LinearOp& op, const PackedRows& packed, const Columns& columns, float* tile) {
    constexpr int kStep = kRows > 4 ? 1 : 8 / kRows;  // as many values of the input as registers have room for
    const int64_t part = min64(panel_part(op.C), packed.block), size = kRows * columns.padded;  // as in product_panels
    const T* w = static_cast<const T*>(op.weight) + columns.first * op.weight_o;
    float* sums = scratch_of<float>(kWeightSlot, size);
    if (op.C == 0) memset(tile, 0, size_t(size) * sizeof(float));
    for (int64_t first = 0; first < op.C; first += part) {
        memset(sums, 0, size_t(size) * sizeof(float));
        const int64_t end = min64(first + part, op.C);
        int64_t s = first;
        for (; s + kStep <= end; s += kStep) {  // with a single tile, blocks of the packed input follow each other
            stream_rows<kRows, kStep>(packed.data + s * kRows, w + s * op.weight_c, op.weight_c, columns.count, sums,
                                      columns.padded);
        }
        for (; s < end; s++) {
            stream_rows<kRows, 1>(packed.data + s * kRows, w + s * op.weight_c, op.weight_c, columns.count, sums,
                                  columns.padded);
        }
        for (int64_t i = 0; i < size; i += W) {
            store(tile + i, first == 0 ? load(sums + i) : add(load(tile + i), load(sums + i)));
        }
    }
}

static void product_streamed(const LinearOp& op, const PackedRows& packed, const Columns& columns, float* tile) {
    with_type(op.weight_dtype, [&](auto type) {
        typedef decltype(type) T;
        switch (packed.tiles.rows) {
            case 1: return stream<1, T>(op, packed, columns, tile);
            case 2: return stream<2, T>(op, packed, columns, tile);
            case 3: return stream<3, T>(op, packed, columns, tile);
            case 4: return stream<4, T>(op, packed, columns, tile);
            case 5: return stream<5, T>(op, packed, columns, tile);
            default: return stream<6, T>(op, packed, columns, tile);
        }
    });
}

// tile [rows, padded] = the packed input times the block's columns of W.
static void product_panels(const LinearOp& op, const PackedRows& packed, const Columns& columns, float* tile) {
    const int64_t panels = ceil_div(columns.count, kPanelWidth), size = kPanelWidth * packed.block;
    const int64_t rows_at_once = kPanelRows / kRowsOfTwo, tiles = packed.tiles.count, part = panel_part(op.C);
    const int64_t element = size_of(op.weight_dtype);
    const bool across = op.weight_c == 1;  // whether a row of memory is a column of the result
    if (is_streamed(across, op.M)) return product_streamed(op, packed, columns, tile);
    float* weight = scratch_of<float>(kWeightSlot, panels * size);
    if (op.C == 0) memset(tile, 0, size_t(packed.tiles.rows * columns.padded) * sizeof(float));
    for (int64_t first = 0; first < op.C; first += packed.block) {
        const int64_t steps = min64(packed.block, op.C - first);
        with_type(op.weight_dtype, [&](auto type) {
            typedef decltype(type) T;
            const T* data = static_cast<const T*>(op.weight) + columns.first * op.weight_o + first * op.weight_c;
            if (!across) return pack_panels_across(data, op.weight_c, columns.count, steps, weight, size);
            for (int64_t p = 0; p < panels; p++) {
                const int64_t o = p * kPanelWidth, count = min64(kPanelWidth, columns.count - o);
                pack_panel(data + o * op.weight_o, op.weight_o, count, steps, round_up(count, W), weight + p * size);
            }
        });
        // While this part is multiplied, chunks of lines of the next one come into L2, all of them from 19 rows on.
        const int64_t next = first + steps < op.C ? first + steps : 0, next_o = next ? 0 : columns.count;
        const char* ahead = static_cast<const char*>(
            at(op.weight, op.weight_dtype, (columns.first + next_o) * op.weight_o + next * op.weight_c));
        const int64_t ahead_row = (across ? op.weight_o : op.weight_c) * element;
        const int64_t ahead_rows = across ? columns.count : packed.block;
        const int64_t row_bytes = (across ? packed.block : columns.count) * element;
        const int64_t chunks = ahead_rows * ceil_div(row_bytes, kChunkBytes), all = panels * tiles;
        int64_t done = 0;
        for (int64_t low = 0; low < tiles; low += rows_at_once) {
            const int64_t high = min64(low + rows_at_once, tiles);
            for (int64_t p = 0; p < panels; p++) {
                const int64_t o = p * kPanelWidth, width = min64(kPanelWidth, columns.padded - o);
                for (int64_t t = low; t < high; t++, done++) {
                    const int64_t row = packed.tiles.first(t), rows = packed.tiles.first(t + 1) - row;
                    const int64_t chunk = done * chunks / all;
                    const bool any = chunk < (done + 1) * chunks / all;
                    const PanelAhead fetch{ahead + chunk % ahead_rows * ahead_row + chunk / ahead_rows * kChunkBytes,
                                           any ? ahead_row : 0};
                    float* sums = tile + row * columns.padded + o;
                    const float* in = packed.at(t, first, steps);
                    if (width == kPanelWidth) {
                        panel_rows<kRowsOfTwo, 2>(rows, in, weight + p * size, steps, part, sums, columns.padded,
                                                  first == 0, fetch);
                    } else {
                        panel_rows<kRowsOfTwo, 1>(rows, in, weight + p * size, steps, part, sums, columns.padded,
                                                  first == 0, fetch);
                    }
                }
            }
        }
    }
}

}  // namespace PEFTK_LEVEL
}  // namespace peftk
