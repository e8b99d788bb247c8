// Log-probabilities of given tokens, without ever writing the logits to memory.

#include <vector>

#include "packing.hpp"
#include "softmax.hpp"

namespace {

void group(const Matrix& head, const Number* hidden, const int64_t* targets, int rows,
           float* found) {
    const Blocks blocks(rows);
    const int pairs = head.pairs;
    std::vector<Pair> x(blocks.length(pairs));
    for (int block = 0; block < blocks.count; block++)
        pack_rows(x.data() + (int64_t)block * blocks.size * pairs, blocks.size,
                  {hidden, 2 * pairs, rows, 2 * pairs}, block * blocks.size,
                  blocks.rows_of(block));
    std::vector<Sum> sums(rows);
    std::vector<float> picked(rows);
    for (int column = 0; column < head.outputs; column += PANEL) {
        const Pair* w = head.panels + (int64_t)column * pairs;
        for (int block = 0; block < blocks.count; block++) {
            const Ahead ahead{w + (int64_t)(PANEL + block * LANES) * pairs, block < 2};
            alignas(64) float logits[ROWS * PANEL];
            TWO[blocks.rows_of(block) - 1](x.data() + (int64_t)block * blocks.size * pairs,
                                           blocks.size, {w, PANEL, LANES}, pairs, logits, PANEL,
                                           false, ahead, nullptr);
            for (int r = 0; r < blocks.rows_of(block); r++) {
                const int row = block * blocks.size + r;
                for (int c = 0; c < PANEL; c += LANES) {
                    const __m512 own = rounded(_mm512_load_ps(logits + r * PANEL + c));
                    sums[row].add(own, first(head.outputs - column - c));
                    const int64_t lane = targets[row] - column - c;
                    if (lane >= 0 && lane < LANES)
                        picked[row] = _mm512_reduce_add_ps(
                            _mm512_maskz_mov_ps((__mmask16)(1u << lane), own));
                }
            }
        }
    }
    for (int row = 0; row < rows; row++) found[row] = picked[row] - sums[row].log();
}

}  // namespace

// hidden [rows, 2 pairs]; writes the log-probability of each row's target.
extern "C" void logprobs(const Matrix* head, const Number* hidden, const int64_t* targets, int rows,
                         float* found, int threads) {
    const int share = (rows + threads - 1) / threads, size = std::min(share, NEAR * ROWS);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int start = 0; start < rows; start += size)
        group(*head, hidden + (int64_t)start * 2 * head->pairs, targets + start,
              std::min(size, rows - start), found + start);
}
