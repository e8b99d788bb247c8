// What lies between the products of a training step, forward and backward. Numbers are rounded to
// bfloat16 where torch's operators round them.
//
// Shapes: N tokens, D model width, I feed-forward width, C columns, V vocabulary.

#include <cmath>
#include <vector>

#include "rows.hpp"
#include "softmax.hpp"

namespace {

constexpr int64_t SHARE = 1 << 14;  // numbers that a thread takes at a time
constexpr int CHUNK = 64;           // tokens whose part in the gradient of a scale is summed up

__m512 sigmoid(__m512 x) {
    const __m512 one = _mm512_set1_ps(1);
    return _mm512_div_ps(one, _mm512_add_ps(one, exponential(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

// Calls work(first, mask) for 16 of `count` numbers at a time, shared among threads.
template <class Work>
void each(int64_t count, int threads, Work work) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t start = 0; start < count; start += SHARE)
        for (int64_t i = start; i < std::min(start + SHARE, count); i += LANES)
            work(i, first(std::min<int64_t>(count - i, LANES)));
}

}  // namespace

// y = x / rms(x) * scale; inverses: one over the root mean square of each token. [N, D], [N].
extern "C" void normalize(const Number* x, const Number* scale, Number* y, float* inverses,
                          int tokens, int width, float eps, int threads) {
#pragma omp parallel for schedule(dynamic, 16) num_threads(threads)
    for (int n = 0; n < tokens; n++) {
        const Number* from = x + (int64_t)n * width;
        inverses[n] = inverse_rms(from, width, eps);
        for (int d = 0; d < width; d += LANES) {
            const __mmask16 mask = first(width - d);
            const __m512 normal = _mm512_mul_ps(widened(from + d, mask), _mm512_set1_ps(inverses[n]));
            store(y + (int64_t)n * width + d,
                  _mm512_mul_ps(rounded(normal), widened(scale + d, mask)), mask);
        }
    }
}

// The gradients of x, and of the scale [D] in float32, summed up in an order that does not depend
// on the threads.
extern "C" void normalize_back(const Number* x, const float* inverses, const Number* scale,
                               const Number* grad_y, Number* grad_x, float* grad_scale, int tokens,
                               int width, int threads) {
    const int chunks = (tokens + CHUNK - 1) / CHUNK, long_width = width + LANES;
    std::vector<float> parts((int64_t)chunks * long_width);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int chunk = 0; chunk < chunks; chunk++) {
        float* sums = parts.data() + (int64_t)chunk * long_width;
        for (int n = chunk * CHUNK; n < std::min((chunk + 1) * CHUNK, tokens); n++) {
            const int64_t row = (int64_t)n * width;
            const __m512 inverse = _mm512_set1_ps(inverses[n]);
            __m512 along = _mm512_setzero_ps();
            for (int d = 0; d < width; d += LANES) {
                const __mmask16 mask = first(width - d);
                const __m512 normal = _mm512_mul_ps(widened(x + row + d, mask), inverse);
                const __m512 product = _mm512_mul_ps(widened(grad_y + row + d, mask), normal);
                _mm512_storeu_ps(sums + d, _mm512_add_ps(_mm512_loadu_ps(sums + d), product));
                along = _mm512_fmadd_ps(product, widened(scale + d, mask), along);
            }
            const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(along) / width);
            for (int d = 0; d < width; d += LANES) {
                const __mmask16 mask = first(width - d);
                const __m512 normal = _mm512_mul_ps(widened(x + row + d, mask), inverse);
                const __m512 slope =
                    _mm512_mul_ps(widened(grad_y + row + d, mask), widened(scale + d, mask));
                store(grad_x + row + d,
                      _mm512_mul_ps(_mm512_fnmadd_ps(normal, mean, slope), inverse), mask);
            }
        }
    }
    for (int d = 0; d < width; d++) {
        grad_scale[d] = 0;
        for (int chunk = 0; chunk < chunks; chunk++)
            grad_scale[d] += parts[(int64_t)chunk * long_width + d];
    }
}

// mixed = silu(gate) * up. [N, I] each.
extern "C" void swiglu(const Number* gate, const Number* up, Number* mixed, int64_t count,
                       int threads) {
    each(count, threads, [&](int64_t i, __mmask16 mask) {
        const __m512 x = widened(gate + i, mask), silu = rounded(_mm512_mul_ps(x, sigmoid(x)));
        store(mixed + i, _mm512_mul_ps(silu, widened(up + i, mask)), mask);
    });
}

// The gradients of gate and up from that of `mixed`, which is written as well.
extern "C" void swiglu_back(const Number* gate, const Number* up, const Number* grad_mixed,
                            Number* grad_gate, Number* grad_up, Number* mixed, int64_t count,
                            int threads) {
    const __m512 one = _mm512_set1_ps(1);
    each(count, threads, [&](int64_t i, __mmask16 mask) {
        const __m512 x = widened(gate + i, mask), y = widened(up + i, mask);
        const __m512 slope = widened(grad_mixed + i, mask), part = sigmoid(x);
        const __m512 silu = rounded(_mm512_mul_ps(x, part));
        const __m512 bend = _mm512_fmadd_ps(x, _mm512_sub_ps(one, part), one);
        const __m512 to_silu = rounded(_mm512_mul_ps(slope, y));
        store(mixed + i, _mm512_mul_ps(silu, y), mask);
        store(grad_up + i, _mm512_mul_ps(silu, slope), mask);
        store(grad_gate + i, _mm512_mul_ps(_mm512_mul_ps(to_silu, part), bend), mask);
    });
}

// y = each head of x turned by its token's angle; back: by minus the angle. x [N, C], of heads of
// `head_width`; cos, sin: [`positions`, `turn_width`], those of token n at n % positions.
extern "C" void turn(const Number* x, const Number* cos, const Number* sin, Number* y, int tokens,
                     int columns, int head_width, int positions, int turn_width, int back,
                     int threads) {
#pragma omp parallel for schedule(dynamic, 16) num_threads(threads)
    for (int n = 0; n < tokens; n++) {
        const int64_t row = (int64_t)n * columns, place = (int64_t)(n % positions) * turn_width;
        for (int head = 0; head < columns; head += head_width)
            turn_head(x + row + head, y + row + head, cos + place + head, sin + place + head,
                      head_width, back ? -1 : 1);
    }
}

// Log-probabilities [N] of targets under softmax(logits [N, V]). Where `becomes_error`,
// softmax - onehot(targets) takes the place of the logits.
extern "C" void softmax(Number* logits, const int64_t* targets, float* logprobs, int tokens,
                        int vocabulary, int becomes_error, int threads) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int n = 0; n < tokens; n++) {
        Number* own = logits + (int64_t)n * vocabulary;
        Sum sum;
        for (int v = 0; v < vocabulary; v += LANES) {
            const __mmask16 mask = first(vocabulary - v);
            sum.add(widened(own + v, mask), mask);
        }
        const float log = sum.log();
        logprobs[n] = widened(own[targets[n]]) - log;
        if (!becomes_error) continue;
        for (int v = 0; v < vocabulary; v += LANES) {
            const __mmask16 mask = first(vocabulary - v);
            const __m512 less = _mm512_sub_ps(widened(own + v, mask), _mm512_set1_ps(log));
            store(own + v, exponential(less), mask);
        }
        store(own + targets[n], _mm512_set1_ps(std::expm1(logprobs[n])), 1);
    }
}
