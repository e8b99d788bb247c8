// The logarithm of a sum of exponentials, on the way.

#pragma once

#include <cmath>

#include "numbers.hpp"

class Sum {
   public:
    void add(__m512 logits, __mmask16 mask) {
        logits = _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), mask, logits);
        if (_mm512_cmp_ps_mask(logits, most, _CMP_GT_OQ)) {
            const __m512 higher = _mm512_max_ps(most, logits);
            sum = _mm512_mul_ps(sum, exponential(_mm512_sub_ps(most, higher)));
            most = higher;
        }
        sum = _mm512_add_ps(sum, exponential(_mm512_sub_ps(logits, most)));
    }

    float log() const {
        const float highest = _mm512_reduce_max_ps(most);
        const __m512 scale = exponential(_mm512_sub_ps(most, _mm512_set1_ps(highest)));
        return highest + std::log(_mm512_reduce_add_ps(_mm512_mul_ps(sum, scale)));
    }

   private:
    __m512 most = _mm512_set1_ps(-1e30f), sum = _mm512_setzero_ps();  // lane by lane
};
