// Draws a token a row by inverting the cumulative distribution at one uniform number, in two steps:
// the block of tokens, then the token.

#include <cmath>
#include <vector>

#include "numbers.hpp"

namespace {

constexpr int BLOCK = 128;

// 16 of a row's logits; beyond the vocabulary, and below everything, lies minus infinity.
__m512 logits_at(const Number* row, int start, int vocabulary) {
    const __mmask16 mask = first(vocabulary - start);
    return _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), mask, widened(row + start, mask));
}

float logit(const Number* row, int token) { return _mm512_cvtss_f32(widened(row + token, 1)); }

// What logits are multiplied by; finite for the smallest temperatures too.
__m512 sharpness(float temperature) { return _mm512_set1_ps(1 / std::max(temperature, 1e-30f)); }

// Sums of e^((logit - most) / temperature) over each block of tokens, and their sum.
double weigh(const Number* row, int vocabulary, float most, float temperature,
             std::vector<float>& blocks) {
    const __m512 scale = sharpness(temperature), top = _mm512_set1_ps(most);
    double total = 0;
    blocks.clear();
    for (int start = 0; start < vocabulary; start += BLOCK) {
        __m512 sum = _mm512_setzero_ps();
        for (int s = start; s < std::min(start + BLOCK, vocabulary); s += LANES) {
            const __m512 below = _mm512_sub_ps(logits_at(row, s, vocabulary), top);
            sum = _mm512_add_ps(sum, exponential(_mm512_mul_ps(below, scale)));
        }
        blocks.push_back(_mm512_reduce_add_ps(sum));
        total += blocks.back();
    }
    return total;
}

// The entry at which the running sum passes `threshold`, which becomes what is left of it; the last
// one that weighs anything, where rounding keeps the sum below.
int search(const float* weights, int count, double& threshold) {
    int found = 0;
    for (int i = 0; i < count; i++) {
        if (!(weights[i] > 0)) continue;
        found = i;
        if (threshold < weights[i]) break;
        threshold -= weights[i];
    }
    return found;
}

int invert(const Number* row, int vocabulary, float most, float temperature, double threshold,
           const std::vector<float>& blocks) {
    const int start = search(blocks.data(), blocks.size(), threshold) * BLOCK;
    float weights[BLOCK];
    for (int s = 0; s < BLOCK; s += LANES) {
        const __m512 below =
            _mm512_sub_ps(logits_at(row, start + s, vocabulary), _mm512_set1_ps(most));
        const __m512 scale = sharpness(temperature);
        _mm512_storeu_ps(weights + s, exponential(_mm512_mul_ps(below, scale)));
    }
    return start + search(weights, std::min(BLOCK, vocabulary - start), threshold);
}

}  // namespace

// logits [rows, vocabulary]; temperature 0 takes the likeliest token. Writes a token of each row,
// and the logarithm of the sum of e^logit, which is no number where a logit is none.
extern "C" void draw(const Number* logits, int rows, int vocabulary, const float* uniforms,
                     const float* temperatures, int64_t* tokens, float* normalizers, int threads) {
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> blocks;
#pragma omp for schedule(dynamic, 1)
        for (int r = 0; r < rows; r++) {
            const Number* row = logits + (int64_t)r * vocabulary;
            __m512 highest = _mm512_set1_ps(-INFINITY);
            for (int s = 0; s < vocabulary; s += LANES)
                highest = _mm512_max_ps(highest, logits_at(row, s, vocabulary));
            const float most = _mm512_reduce_max_ps(highest);
            double total = weigh(row, vocabulary, most, 1, blocks);
            normalizers[r] = most + std::log(total);
            if (temperatures[r] == 0) {
                int token = 0;
                while (token < vocabulary - 1 && logit(row, token) != most) token++;
                tokens[r] = token;
                continue;
            }
            if (temperatures[r] != 1) total = weigh(row, vocabulary, most, temperatures[r], blocks);
            tokens[r] = invert(row, vocabulary, most, temperatures[r], uniforms[r] * total, blocks);
        }
    }
}
