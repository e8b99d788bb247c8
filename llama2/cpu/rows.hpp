// What a step and a training step both do with a row of numbers.

#pragma once

#include <cmath>

#include "numbers.hpp"

// One over the root mean square.
inline float inverse_rms(const Number* row, int width, float eps) {
    __m512 squares = _mm512_setzero_ps();
    for (int d = 0; d < width; d += LANES) {
        const __m512 numbers = widened(row + d, first(width - d));
        squares = _mm512_fmadd_ps(numbers, numbers, squares);
    }
    return 1 / std::sqrt(_mm512_reduce_add_ps(squares) / width + eps);
}

// Turns a head by the angle whose cosine and sine, with a minus in its first half, are given; with
// `sign` -1 back. `to` may be `from`.
inline void turn_head(const Number* from, Number* to, const Number* cos, const Number* sin,
                      int width, float sign = 1) {
    const int half = width / 2;
    for (int k = 0; k < half; k += LANES) {
        const __mmask16 mask = first(half - k);
        const __m512 a = widened(from + k, mask), b = widened(from + half + k, mask);
        const auto turned = [&](__m512 own, __m512 other, int at) {
            const __m512 product = rounded(_mm512_mul_ps(own, widened(cos + at, mask)));
            const __m512 across = _mm512_mul_ps(_mm512_set1_ps(sign), widened(sin + at, mask));
            return _mm512_fmadd_ps(other, across, product);
        };
        store(to + k, turned(a, b, k), mask);
        store(to + half + k, turned(b, a, half + k), mask);
    }
}
