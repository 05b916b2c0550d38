// Matrix products over packed weights: C[m, n] = sum over k of A[m, k] * W[n, k].
//
// W lies in panels of 32 columns, `[panels, words, 32]` words (see muxserve.engine.packing). A tile is up to
// TILE_ROWS rows by one panel and stays in registers for the whole of k. Every element of C is one chain of
// additions in the order of k, whatever the number of rows, tiles or threads: a row's result does not depend on
// the batch it is in.

#pragma once

#include "simd.h"

// With so few rows a tile waits for memory alone, and the hardware's own prefetching does best.
constexpr int FEW_ROWS = TILE_ROWS / 3;

// Row-major words: element (m, k) is `words[m * row + k * step]`.
struct Operand {
    const uint32_t* words;
    int64_t row;
    int64_t step = 1;

    INLINE Operand from(int64_t m) const { return {words + m * row, row, step}; }
};

// Adds ROWS rows of `a` times a panel of `words` words to `sums`, and brings memory from `ahead` on, as much as
// the panel's own, nearer.
template <class Type, int ROWS>
INLINE void multiply_tile(
    Operand a, const uint32_t* panel, int64_t words, const uint32_t* ahead, Floats (&sums)[ROWS][PANEL_VECTORS]
) {
    for (int64_t k = 0; k < words; k++) {
        Words b[PANEL_VECTORS];
#pragma GCC unroll 8
        for (int v = 0; v < PANEL_VECTORS; v++) b[v] = load<Words>(panel + k * PANEL + v * LANES);
        if constexpr (ROWS > FEW_ROWS) {
#pragma GCC unroll 2
            for (int line = 0; line < PANEL; line += 16) __builtin_prefetch(ahead + k * PANEL + line, 0, 2);
        }
#pragma GCC unroll 16
        for (int m = 0; m < ROWS; m++) {
            Words x = splat_word(a.words[m * a.row + k * a.step]);
#pragma GCC unroll 8
            for (int v = 0; v < PANEL_VECTORS; v++) sums[m][v] = Type::mac(sums[m][v], x, b[v]);
        }
    }
}

// A tile from scratch; its sums go to memory, `[ROWS, PANEL]`. Not inlined: it is compiled once for each size.
template <class Type, int ROWS>
__attribute__((noinline)) void tile(
    Operand a, const uint32_t* panel, int64_t words, const uint32_t* ahead, float* to
) {
    Floats sums[ROWS][PANEL_VECTORS] = {};
    multiply_tile<Type, ROWS>(a, panel, words, ahead, sums);
#pragma GCC unroll 16
    for (int m = 0; m < ROWS; m++)
        for (int v = 0; v < PANEL_VECTORS; v++) store(to + m * PANEL + v * LANES, sums[m][v]);
}

// Calls `f` with `count` (1 to ROWS) as a compile-time constant.
template <int ROWS = TILE_ROWS, class F>
INLINE void with_rows(int count, F f) {
    if constexpr (ROWS == 1) {
        f(std::integral_constant<int, 1>{});
    } else {
        if (count == ROWS) {
            f(std::integral_constant<int, ROWS>{});
        } else {
            with_rows<ROWS - 1>(count, f);
        }
    }
}

// Rows `[begin, end)` of `a` times one panel; `finish(row, sums)` gets each row's PANEL sums as vectors, and
// `target(row)` is where it will put them, so that this memory is near by then.
// Rows are spread evenly over the tiles: a last one of few rows would wait for its own additions.
template <class Type, class Target, class Finish>
INLINE void multiply_panel(
    Operand a, int64_t begin, int64_t end, const uint32_t* panel, int64_t words, int64_t ahead, Target target,
    Finish finish
) {
    const int64_t tiles = (end - begin + TILE_ROWS - 1) / TILE_ROWS;
    for (int64_t i = 0; i < tiles; i++) {
        const int64_t first = begin + (end - begin) * i / tiles, last = begin + (end - begin) * (i + 1) / tiles;
        alignas(64) float sums[TILE_ROWS * PANEL];
        for (int64_t m = first; m < last; m++)
            for (int line = 0; line < PANEL; line += 16) __builtin_prefetch(target(m) + line, 1, 3);
        with_rows((int)(last - first), [&](auto rows) {
            tile<Type, rows()>(a.from(first), panel, words, panel + ahead, sums);
        });
        for (int64_t m = first; m < last; m++) {
            Floats row[PANEL_VECTORS];
            for (int v = 0; v < PANEL_VECTORS; v++) row[v] = load<Floats>(sums + (m - first) * PANEL + v * LANES);
            finish(m, row);
        }
    }
}
