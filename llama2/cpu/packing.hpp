// Tables of numbers brought into the order that the tile reads: pairs along the dimension that is
// summed over, of so many items (rows, or columns) beside each other.

#pragma once

#include <vector>

#include "tile.hpp"

// Numbers in memory.
struct Table {
    const Number* first_row;
    int64_t stride;  // from row to row
    int rows, columns;
};

// Sixteen vectors of 32 bits each become those of their first, second, ... lanes.
inline void transpose(__m512i x[LANES]) {
    __m512i y[LANES];
    for (int r = 0; r < LANES; r += 4) {
        const __m512i a = _mm512_unpacklo_epi32(x[r], x[r + 1]);
        const __m512i b = _mm512_unpackhi_epi32(x[r], x[r + 1]);
        const __m512i c = _mm512_unpacklo_epi32(x[r + 2], x[r + 3]);
        const __m512i d = _mm512_unpackhi_epi32(x[r + 2], x[r + 3]);
        y[r] = _mm512_unpacklo_epi64(a, c);
        y[r + 1] = _mm512_unpackhi_epi64(a, c);
        y[r + 2] = _mm512_unpacklo_epi64(b, d);
        y[r + 3] = _mm512_unpackhi_epi64(b, d);
    }
    for (int r = 0; r < 4; r++) {
        const __m512i a = _mm512_shuffle_i32x4(y[r], y[r + 4], 0x88);
        const __m512i b = _mm512_shuffle_i32x4(y[r], y[r + 4], 0xDD);
        const __m512i c = _mm512_shuffle_i32x4(y[r + 8], y[r + 12], 0x88);
        const __m512i d = _mm512_shuffle_i32x4(y[r + 8], y[r + 12], 0xDD);
        x[r] = _mm512_shuffle_i32x4(a, c, 0x88);
        x[r + 4] = _mm512_shuffle_i32x4(b, d, 0x88);
        x[r + 8] = _mm512_shuffle_i32x4(a, c, 0xDD);
        x[r + 12] = _mm512_shuffle_i32x4(b, d, 0xDD);
    }
}

// to[k * stride + i] = pair k of row start + i, for i below `count`; 0 outside of the table.
inline void pack_rows(Pair* to, int stride, const Table& from, int start, int count) {
    const int pairs = (from.columns + 1) / 2;
    for (int i = 0; i < count; i += LANES)
        for (int k = 0; k < pairs; k += LANES) {
            __m512i block[LANES];
            const int numbers = from.columns - 2 * k;
            const __mmask32 mask = numbers >= 2 * LANES ? ~0u : (1u << numbers) - 1;
            for (int r = 0; r < LANES; r++) {
                const int row = start + i + r;
                const bool there = i + r < count && row < from.rows;
                const Number* numbers = from.first_row + (there ? row : 0) * from.stride + 2 * k;
                block[r] = _mm512_maskz_loadu_epi16(there ? mask : 0, numbers);
            }
            transpose(block);
            for (int r = 0; r < std::min(LANES, pairs - k); r++)
                _mm512_mask_storeu_epi32(to + (int64_t)(k + r) * stride + i, first(count - i),
                                         block[r]);
        }
}

// to[k * stride + i] = rows 2k and 2k + 1 of column start + i; 0 outside of the table.
inline void pack_columns(Pair* to, int stride, const Table& from, int start, int count) {
    for (int i = 0; i < count; i += LANES) {
        const __mmask16 all = first(count - i), there = all & first(from.columns - start - i);
        for (int row = 0; row < from.rows; row += 2) {
            const Number* numbers = from.first_row + row * from.stride + start + i;
            __m512i both = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, numbers));
            if (row + 1 < from.rows) {
                const __m256i odd = _mm256_maskz_loadu_epi16(there, numbers + from.stride);
                both = _mm512_or_si512(both, _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
            }
            _mm512_mask_storeu_epi32(to + (int64_t)row / 2 * stride + i, all, both);
        }
    }
}

// Memory that is kept from call to call, since new memory costs more than what is done with it.
class Kept {
   public:
    template <class T>
    T* room(int64_t count) {
        const size_t needed = (count * sizeof(T) + sizeof(Line) - 1) / sizeof(Line);
        if (lines.size() < needed) lines.resize(needed);
        return reinterpret_cast<T*>(lines.data());
    }

   private:
    struct alignas(64) Line {
        char bytes[64];
    };
    std::vector<Line> lines;
};
