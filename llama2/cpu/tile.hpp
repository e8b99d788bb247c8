// The product that all others are made of: a few rows times a panel of columns, both stored as
// pairs along the dimension that is summed over, which is what the instruction multiplies. A row's
// result does not depend on the rows beside it, to the bit.

#pragma once

#include <vector>

#include "numbers.hpp"

using Pair = uint32_t;  // two bfloat16

constexpr int PANEL = 32;  // columns of a panel: two vectors
constexpr int ROWS = 14;   // most rows of a tile: 28 of 32 registers sum up
constexpr int NEAR = 10;   // blocks of rows that stay in a processor's own cache

// Columns of a product: vectors of 16 columns, `vector` apart, of which the next pair is `pair` on.
struct Columns {
    const Pair* first;
    int pair, vector;

    const Pair* at(int64_t k, int64_t v) const { return first + k * pair + v * vector; }
};

// Memory that comes next and is brought closer meanwhile: `lines` of 64 bytes for each pair.
struct Ahead {
    const Pair* first;
    int lines;
};

// Memory that is needed later, brought closer on the way, a line for each pair of a product:
// products of many rows leave the memory idle.
class Stream {
   public:
    void clear() {
        parts.clear();
        next = left = 0;
    }
    void add(const Pair* first, int64_t lines) { parts.push_back({first, lines}); }
    void bring() {
        if (!left) {
            if (next == parts.size()) return;
            line = parts[next].first;
            left = parts[next++].lines;
        }
        _mm_prefetch(line, _MM_HINT_T1);
        line += LANES;
        left--;
    }

   private:
    struct Part {
        const Pair* first;
        int64_t lines;
    };
    std::vector<Part> parts;
    const Pair* line = nullptr;
    size_t next = 0;
    int64_t left = 0;
};

// sums[row][column] (+)= x[row] w[column] for M rows and V vectors of columns over `pairs` pairs.
// x: a row's pairs lie `x_stride` apart.
template <int M, int V>
void tile(const Pair* x, int x_stride, Columns w, int pairs, float* sums, int sums_stride, bool add,
          Ahead ahead, Stream* stream) {
    __m512 sum[M][V];
    for (int m = 0; m < M; m++)
        for (int v = 0; v < V; v++)
            sum[m][v] = add ? _mm512_loadu_ps(sums + m * sums_stride + v * LANES)
                            : _mm512_setzero_ps();
    for (int k = 0; k < pairs; k++) {
        __m512bh columns[V];
        for (int v = 0; v < V; v++) columns[v] = (__m512bh)_mm512_loadu_si512(w.at(k, v));
        for (int line = 0; line < ahead.lines; line++)
            _mm_prefetch(ahead.first + ((int64_t)k * ahead.lines + line) * LANES, _MM_HINT_T1);
        if (stream) stream->bring();
#pragma GCC unroll 14
        for (int m = 0; m < M; m++) {
            const __m512bh row = (__m512bh)_mm512_set1_epi32(x[k * x_stride + m]);
            for (int v = 0; v < V; v++) sum[m][v] = _mm512_dpbf16_ps(sum[m][v], row, columns[v]);
        }
    }
    for (int m = 0; m < M; m++)
        for (int v = 0; v < V; v++)
            _mm512_storeu_ps(sums + m * sums_stride + v * LANES, sum[m][v]);
}

using Tile = void (*)(const Pair*, int, Columns, int, float*, int, bool, Ahead, Stream*);
// For 1 to 14 rows: of two vectors, and of one.
const Tile TWO[ROWS] = {tile<1, 2>,  tile<2, 2>,  tile<3, 2>,  tile<4, 2>, tile<5, 2>,
                        tile<6, 2>,  tile<7, 2>,  tile<8, 2>,  tile<9, 2>, tile<10, 2>,
                        tile<11, 2>, tile<12, 2>, tile<13, 2>, tile<14, 2>};
const Tile ONE[ROWS] = {tile<1, 1>,  tile<2, 1>,  tile<3, 1>,  tile<4, 1>, tile<5, 1>,
                        tile<6, 1>,  tile<7, 1>,  tile<8, 1>,  tile<9, 1>, tile<10, 1>,
                        tile<11, 1>, tile<12, 1>, tile<13, 1>, tile<14, 1>};

// The same for any number of vectors. next: so much memory as w's is brought closer, or null.
inline void tiles(int rows, int vectors, const Pair* x, int x_stride, const Columns& w, int pairs,
                  float* sums, int sums_stride, bool add, const Pair* next) {
    int done = 0;
    const auto some = [&](Tile tile, int count) {
        for (; vectors - done >= count; done += count)
            tile(x, x_stride, {w.at(0, done), w.pair, w.vector}, pairs, sums + done * LANES,
                 sums_stride, add, {next + (int64_t)done * pairs * LANES, next ? count : 0},
                 nullptr);
    };
    if (rows == 1) {  // more sums, to hide how long each takes
        some(tile<1, 4>, 4);
        some(tile<1, 3>, 3);
    }
    some(TWO[rows - 1], 2);
    some(ONE[rows - 1], 1);
}

// How rows lie that are an input of a product: in blocks of `size`, and in a block pair after pair.
struct Blocks {
    int rows, count, size;

    explicit Blocks(int rows)
        : rows(rows),
          count((rows + ROWS - 1) / ROWS),
          size(count ? (rows + count - 1) / count : 0) {}

    int rows_of(int block) const { return std::min(size, rows - block * size); }
    int64_t length(int pairs) const { return (int64_t)count * size * pairs; }
    // Where the first of `pairs` pairs of a row lies; the next ones are `size` apart.
    int64_t place(int row, int pairs) const {
        return (int64_t)(row / size) * size * pairs + row % size;
    }
};

// Writes 16 numbers, or the first `count` of them, as pairs that are `stride` apart.
inline void spread(Pair* to, int stride, __m512 x, int count = LANES) {
    if (stride == 1 && count >= LANES) return store(reinterpret_cast<Number*>(to), x);
    alignas(64) Number numbers[LANES];
    store(numbers, x);
    const Pair* from = reinterpret_cast<const Pair*>(numbers);
    for (int j = 0; j < std::min(LANES, count) / 2; j++) to[(int64_t)j * stride] = from[j];
}

// A matrix as products read it; the same as in step.py, field by field. I inputs, O outputs.
struct Matrix {
    const Pair* panels;  // [O / 32, I / 2, 32]
    const float* bias;   // [O] or null
    int32_t outputs, pairs;
};
