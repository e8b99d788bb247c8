// Vectors of bfloat16 numbers, widened to float32 to be computed with.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

using Number = uint16_t;  // a bfloat16

constexpr int LANES = 16;

// The first `count` lanes.
inline __mmask16 first(int count) {
    return count >= LANES ? 0xFFFF : (1u << std::max(count, 0)) - 1;
}

inline __m512 widened(const Number* from, __mmask16 mask = 0xFFFF) {
    const __m256i numbers = _mm256_maskz_loadu_epi16(mask, from);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(numbers), 16));
}

inline float widened(Number x) {
    const uint32_t bits = (uint32_t)x << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
}

inline __m256i narrowed(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }

inline __m512 rounded(__m512 x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrowed(x)), 16));
}

inline void store(Number* to, __m512 x, __mmask16 mask = 0xFFFF) {
    if (mask == 0xFFFF)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), narrowed(x));
    else
        _mm256_mask_storeu_epi16(to, mask, narrowed(x));
}

// e^x to a unit in the last place or two: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2].
inline __m512 exponential(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-110), x);  // 0 from there on; in this order NaN stays NaN
    const __m512 y = _mm512_mul_ps(x, _mm512_set1_ps(1.44269504f));
    const __m512 whole = _mm512_roundscale_ps(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 rest = _mm512_fnmadd_ps(whole, _mm512_set1_ps(0.693359375f), x);
    rest = _mm512_fnmadd_ps(whole, _mm512_set1_ps(-2.12194440e-4f), rest);
    __m512 sum = _mm512_set1_ps(1.0f / 720);
    for (float term : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
        sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(term));
    return _mm512_scalef_ps(sum, whole);
}
