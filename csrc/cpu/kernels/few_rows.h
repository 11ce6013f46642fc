// The lanes form at AVX2: for a few rows, packing W would cost more than it gains.
//
// Lanes are rows of the input, two registers of them, packed [steps, 2W]. Six rows of W at a time are read where they
// lie, and their elements are broadcast. Only for fp32: to widen 16 bits costs as much as to pack them. The sums are
// those of the panels form, bit for bit.
#pragma once

#include "cpu/kernels/panels.h"

namespace peftk {
namespace PEFTK_LEVEL {

// Whether the rows fill two registers nearly: empty lanes are multiplied too. Above 64 rows it gains nothing.
static inline bool are_few(const LinearOp& op) {
    return along_contraction(op) && op.weight_dtype == kFloat32 && !op.packed() && op.M <= 64 &&
           round_up(op.M, 2 * W) - op.M <= 2;
}

// c [kRows, c_row] += kRows rows of W, w_row elements apart, times l [steps, 2W].
template <int kRows>
PEFTK_TILE void few_tile(const float* w, int64_t w_row, const float* l, int64_t steps, int64_t part, float* c,
                         int64_t c_row, bool fresh, PanelAhead ahead) {
    Vec acc[kRows][2];
    const float* second = w + 3 * w_row;  // so that every row is at one of two addresses plus 0, 1 or 2 strides
    const auto step = [&](int s) __attribute__((always_inline)) {
        Vec lanes[2];
#pragma GCC unroll 2
        for (int v = 0; v < 2; v++) lanes[v] = load_once(l + (2 * s + v) * W);
#pragma GCC unroll 8
        for (int i = 0; i < kRows; i++) {
            const float* row = i < 3 ? w + i * w_row : second + (i - 3) * w_row;
            const Vec value = set1(row[s]);
#pragma GCC unroll 2
            for (int v = 0; v < 2; v++) fma_in_place(acc[i][v], value, lanes[v]);
        }
    };
    const auto advance = [&](int n) __attribute__((always_inline)) { w += n, second += n, l += 2 * n * W; };
    for (; steps > 0; steps -= part, fresh = false) {
#pragma GCC unroll 8
        for (int i = 0; i < kRows; i++) acc[i][0] = acc[i][1] = zero();
        const int64_t end = min64(part, steps);
        for (int64_t chunk = end / kPanelChunk; chunk > 0; chunk--, ahead.line += ahead.next) {
            for (int s = 0; s < kPanelChunk / 4; s++) {
                __builtin_prefetch(ahead.line + 64 * s, 0, 2);
                __builtin_prefetch(ahead.line + 64 * s + ahead.second, 0, 2);
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++) step(j);
                advance(4);
            }
        }
        for (int64_t s = end % kPanelChunk; s > 0; s--) step(0), advance(1);
        asm volatile("" : "+r"(c)::"memory");  // as in panel_tile
#pragma GCC unroll 8
        for (int i = 0; i < kRows; i++) {
#pragma GCC unroll 2
            for (int v = 0; v < 2; v++) {
                float* total = c + i * c_row + v * W;
                store(total, fresh ? acc[i][v] : add(load(total), acc[i][v]));
            }
        }
    }
}

template <int kRows>
static void few_rows(int64_t rows, const float* w, int64_t w_row, const float* l, int64_t steps, int64_t part, float* c,
                     int64_t c_row, bool fresh, PanelAhead ahead) {
    if (rows == kRows) {
        few_tile<kRows>(w, w_row, l, steps, part, c, c_row, fresh, ahead);
    } else if constexpr (kRows > 1) {
        few_rows<kRows - 1>(rows, w, w_row, l, steps, part, c, c_row, fresh, ahead);
    }
}

// acc [columns, acc_row] = the block's columns of W times `rows` rows of the input, packed [rows / 2W, C, 2W].
static void product_few(const LinearOp& op, int64_t rows, const float* in, const Columns& columns, float* acc,
                        int64_t acc_row) {
    const RowTiles tiles(columns.count, kPanelRows);
    const int64_t lanes = round_up(rows, 2 * W);
    if (op.C == 0) memset(acc, 0, size_t(columns.count * acc_row) * sizeof(float));
    for (int64_t first = 0; first < op.C; first += panel_steps(op)) {
        const int64_t steps = min64(panel_steps(op), op.C - first), part = panel_part(op, first);
        const float* w = static_cast<const float*>(op.weight) + columns.first * op.weight_o + first;
        const NextSteps next(op, columns, first, first + steps, tiles.count * (lanes / (2 * W)));
        int64_t done = 0;
        for (int64_t lane = 0; lane < lanes; lane += 2 * W) {
            for (int64_t t = 0; t < tiles.count; t++, done++) {
                const int64_t o = tiles.first(t);
                few_rows<kPanelRows>(tiles.first(t + 1) - o, w + o * op.weight_o, op.weight_o,
                                     in + lane * op.C + first * 2 * W, steps, part, acc + o * acc_row + lane, acc_row,
                                     first == 0, next.share(done));
            }
        }
    }
}

}  // namespace PEFTK_LEVEL
}  // namespace peftk
