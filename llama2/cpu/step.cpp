// A forward pass on a CPU with AVX512-BF16: tokens of many rows through all layers, with keys and
// values in pages, in one call.
//
// Weights lie as panels of 32 outputs, keys as pairs of features by tokens, values as pairs of
// tokens by features, inputs of products as blocks of rows. Numbers are rounded to bfloat16 where
// the trainer rounds them.
//
// Shapes: N tokens, D model width, I feed-forward width, H query heads, G key/value heads, Q query
// heads a key/value head, K head width, P tokens of a page, R tokens that are asked for, V
// vocabulary.

#include <omp.h>

#include <cmath>
#include <numeric>
#include <vector>

#include "rows.hpp"
#include "tile.hpp"

namespace {

constexpr int PAGE = 64;
constexpr int64_t CARRIED = 16 << 20;  // bytes that stay in the last cache through some products

}  // namespace

extern "C" {

// The same as in step.py, field by field.
struct Layer {
    Matrix qkv;  // the queries, key and value of a group, then those of the next one
    Matrix o;
    Matrix gate_up;  // 16 outputs of either in a panel
    Matrix down;
    const Number *attention_norm, *feed_forward_norm;
    Pair* keys;    // [pages, G, P / 16, K / 2, 16]
    Pair* values;  // [pages, G, P / 2, K up to a multiple of 16]
};

struct Model {
    const Layer* layers;
    Matrix head;
    const Number *embeddings, *norm;
    const Number *cos, *sin;  // [positions, K], the sine of a head's first half with a minus
    int32_t depth, width, heads, groups, head_width;
    float eps;
};

struct Span {
    int32_t start, past, length, pages;  // first token of the batch; pages: first in the table
};

struct Batch {
    const int64_t* tokens;
    const Span* spans;
    const int32_t* pages;
    const int32_t* asked;  // tokens, rising
    Number* output;        // [R, V]
    int32_t token_count, span_count, asked_count, threads;
};
}

namespace {

// Part of an attention: up to 14 of the queries of one key/value head of a span, counted by token
// and then by head.
struct Work {
    int32_t span, group, first, rows;
};

// What of a layer's attention is computed: all, or in the last layer what tokens see that are asked
// for.
struct Attention {
    Blocks rows;               // of what follows
    std::vector<int32_t> row;  // of each token, or -1
    std::vector<Work> work;
    std::vector<int32_t> first;  // of each thread's share of the work, and its end
    std::vector<int32_t> early;  // tokens that are turned and kept before any work begins
};

// Takes a product as rows of `width` numbers, one behind the other.
struct Rows {
    Number* first_row;
    int width;

    void operator()(int row, const float* sums, int column) const {
        Number* to = first_row + (int64_t)row * width + column;
        for (int c = 0; c < PANEL; c += LANES)
            store(to + c, _mm512_loadu_ps(sums + c), first(width - column - c));
    }
};

class Step {
   public:
    Step(const Model& model, const Batch& batch);
    void run();

   private:
    Attention attention(const std::vector<int32_t>& tokens) const;
    void attend(const Layer& layer, const Attention& attention);
    void announce(const Layer& layer, const Attention& attention) const;
    const Pair* part(const Pair* memory, int pairs, const Work& work, int start) const;
    const Pair* keys(const Layer& layer, const Work& work, int start) const;
    const Pair* values(const Layer& layer, const Work& work, int start) const;
    void mix(const Layer& layer, const Attention& attention, const Work& work, const Work* next);
    void turn_and_keep(const Layer& layer, int token, int group);
    void turn(Number* head, int position) const;
    void normalize(const Number* scale, const Blocks& into);
    template <class Take>
    void multiply(const Matrix& matrix, const Blocks& rows, const Pair* x, const Matrix& next,
                  Take take);
    void add(const Matrix& matrix, const Blocks& rows, const Pair* x, const Matrix& next);

    const Model& model;
    const Batch& batch;
    const int H, G, Q, K, D, padded, qkv_width;
    std::vector<int32_t> positions, pages;  // of the tokens: place in the text, and page
    std::vector<char> starts, ends;         // whether it is the first one of its span, the last
    Attention whole, asked;
    Number *residual, *qkv;
    Pair *input, *wide;

    // Kept from step to step, since new memory costs more than what is done with it.
    static thread_local std::vector<Number> residuals, qkvs;
    static thread_local std::vector<Pair> inputs, wides, weights;
    static thread_local std::vector<float> scores, inverses;
    static thread_local Stream stream;
};

thread_local std::vector<Number> Step::residuals, Step::qkvs;
thread_local std::vector<Pair> Step::inputs, Step::wides, Step::weights;
thread_local std::vector<float> Step::scores, Step::inverses;
thread_local Stream Step::stream;

template <class T>
T* room(std::vector<T>& memory, int64_t count) {
    if ((int64_t)memory.size() < count) memory.resize(count);
    return memory.data();
}

// Brings closer what is read soon; there need not be so much.
void bring(const Number* numbers, int count) {
    for (int i = 0; i < count; i += 2 * LANES) _mm_prefetch(numbers + i, _MM_HINT_T0);
}

Step::Step(const Model& model, const Batch& batch)
    : model(model), batch(batch), H(model.heads), G(model.groups), Q(H / G), K(model.head_width),
      D(model.width), padded((K + LANES - 1) / LANES * LANES), qkv_width((H + 2 * G) * K),
      whole{Blocks(0)}, asked{Blocks(0)} {
    const int tokens = batch.token_count;
    for (int s = 0; s < batch.span_count; s++)
        for (int n = 0; n < batch.spans[s].length; n++) {
            positions.push_back(batch.spans[s].past + n);
            pages.push_back(batch.pages[batch.spans[s].pages + positions.back() / PAGE]);
            starts.push_back(n == 0);
            ends.push_back(n == batch.spans[s].length - 1);
        }
    asked = attention({batch.asked, batch.asked + batch.asked_count});
    std::vector<int32_t> all(tokens);
    std::iota(all.begin(), all.end(), 0);
    whole = attention(all);
    residual = room(residuals, (int64_t)tokens * D);
    qkv = room(qkvs, (int64_t)tokens * qkv_width);
    input = room(inputs, whole.rows.length(std::max(D, H * K) / 2));
    wide = room(wides, whole.rows.length(model.layers[0].down.pairs));
}

Attention Step::attention(const std::vector<int32_t>& tokens) const {
    Attention made{Blocks(tokens.size()), std::vector<int32_t>(batch.token_count, -1)};
    for (size_t row = 0; row < tokens.size(); row++) made.row[tokens[row]] = row;
    const auto needed = [&](int token) { return made.row[token] >= 0; };
    // What is done for a token alone, its work does: the lines it writes to it reads as well.
    for (int s = 0; s < batch.span_count; s++) {
        const Span& span = batch.spans[s];
        if (span.length > 1 || Q > ROWS || !needed(span.start))
            for (int n = 0; n < span.length; n++) made.early.push_back(span.start + n);
    }
    // A thread has the groups whose queries, keys and values it computes, as far as they come out
    // even, and goes through memory in its order.
    const int threads = batch.threads;
    std::vector<int64_t> cost{0};  // of all work so far
    for (int t = 0; t < threads; t++)
        for (int s = 0; s < batch.span_count; s++)
            for (int g = G * t / threads; g < G * (t + 1) / threads; g++) {
                const Span& span = batch.spans[s];
                for (int first = 0; first < span.length * Q; first += ROWS) {
                    const int count = std::min(ROWS, span.length * Q - first);
                    const int last = (first + count - 1) / Q;
                    bool any = false;
                    for (int n = first / Q; n <= last; n++) any |= needed(span.start + n);
                    if (!any) continue;
                    made.work.push_back({s, g, first, count});
                    // To read a key takes about as long as to compute with it for two rows.
                    cost.push_back(cost.back() + (2 + count) * (int64_t)(span.past + last + 1));
                }
            }
    // A work belongs to the thread in whose share its middle lies.
    const int count = made.work.size();
    for (int t = 0, w = 0; t <= threads; t++) {
        while (w < count && (cost[w] + cost[w + 1]) * threads < 2 * cost.back() * t) w++;
        made.first.push_back(w);
    }
    return made;
}

void Step::run() {
#pragma omp parallel num_threads(batch.threads)
    {
        announce(model.layers[0], model.depth > 1 ? whole : asked);
#pragma omp for schedule(static)
        for (int n = 0; n < batch.token_count; n++)
            std::copy_n(model.embeddings + batch.tokens[n] * D, D, residual + (int64_t)n * D);
        for (int l = 0; l < model.depth; l++) {
            const Layer& layer = model.layers[l];
            const bool last = l == model.depth - 1;
            normalize(layer.attention_norm, whole.rows);
            multiply(layer.qkv, whole.rows, input, layer.o, Rows{qkv, qkv_width});
            const Attention& attention = last ? asked : whole;
            attend(layer, attention);
            const Blocks& rows = attention.rows;
            if (last) {  // nothing more is computed for the others
#pragma omp single
                for (int r = 0; r < batch.asked_count; r++)
                    std::copy_n(residual + (int64_t)batch.asked[r] * D, D,
                                residual + (int64_t)r * D);
            }
            add(layer.o, rows, input, layer.gate_up);
            normalize(layer.feed_forward_norm, rows);
            const int inner = layer.down.pairs;
            const auto gated = [&](int row, const float* sums, int column) {
                const __m512 gate = rounded(_mm512_loadu_ps(sums));
                const __m512 up = rounded(_mm512_loadu_ps(sums + LANES));
                const __m512 one = _mm512_set1_ps(1);
                const __m512 e = exponential(_mm512_sub_ps(_mm512_setzero_ps(), gate));
                const __m512 silu = rounded(_mm512_div_ps(gate, _mm512_add_ps(one, e)));
                const int done = column / 2;  // half of the panel's columns are gates
                spread(wide + rows.place(row, inner) + (int64_t)done / 2 * rows.size, rows.size,
                       _mm512_mul_ps(silu, up), 2 * inner - done);
            };
            multiply(layer.gate_up, rows, input, layer.down, gated);
            if (!last) announce(model.layers[l + 1], l + 2 < model.depth ? whole : asked);
            add(layer.down, rows, wide, last ? model.head : model.layers[l + 1].qkv);
        }
        normalize(model.norm, asked.rows);
        const Rows logits{batch.output, model.head.outputs};
        multiply(model.head, asked.rows, input, model.layers[0].qkv, logits);
    }
}

// Hands over every row of x W^T + b, 32 columns at a time: take(row, its sums, first column).
// next: of the product after this one. Called by all threads, ends together.
template <class Take>
void Step::multiply(const Matrix& matrix, const Blocks& rows, const Pair* x, const Matrix& next,
                    Take take) {
    const int panels = (matrix.outputs + PANEL - 1) / PANEL, pairs = matrix.pairs;
    const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
    const int64_t first_next = (next.outputs + PANEL - 1) / PANEL * thread / threads;
    const Pair* then = next.panels + first_next * PANEL * next.pairs;
    // So many blocks at a time as a processor keeps near while it goes through all panels.
    for (int from = 0; from < rows.count; from += NEAR) {
        const int blocks = std::min(NEAR, rows.count - from), units = panels * blocks;
        const int end = (int64_t)units * (thread + 1) / threads;
        for (int unit = (int64_t)units * thread / threads; unit < end; unit++) {
            const int panel = unit / blocks, block = from + unit % blocks;
            const int count = rows.rows_of(block), column = panel * PANEL;
            const Pair* w = matrix.panels + (int64_t)column * pairs;
            // The next panel, a half of it with each of the first two blocks.
            const int half = block - from, lines = blocks == 1 ? 2 : half < 2;
            const Pair* after = panel == (end - 1) / blocks ? then : w + (int64_t)PANEL * pairs;
            const Ahead ahead{after + (int64_t)half * LANES * pairs, lines};
            alignas(64) float sums[ROWS * PANEL];
            TWO[count - 1](x + (int64_t)block * rows.size * pairs, rows.size, {w, PANEL, LANES},
                           pairs, sums, PANEL, false, ahead, &stream);
            if (matrix.bias)
                for (int i = 0; i < count * PANEL; i++)
                    sums[i] += matrix.bias[column + i % PANEL];
            for (int r = 0; r < count; r++) take(block * rows.size + r, sums + r * PANEL, column);
        }
    }
#pragma omp barrier
}

// The residual stream plus a product.
void Step::add(const Matrix& matrix, const Blocks& rows, const Pair* x, const Matrix& next) {
    multiply(matrix, rows, x, next, [&](int row, const float* sums, int column) {
        for (int c = 0; c < PANEL; c += LANES) {
            const __mmask16 mask = first(D - column - c);
            Number* to = residual + (int64_t)row * D + column + c;
            const __m512 product = rounded(_mm512_loadu_ps(sums + c));
            store(to, _mm512_add_ps(widened(to, mask), product), mask);
        }
    });
}

// The next product's input: rows by their root mean square, times the scale. Threads share columns
// and not rows, which lie between each other. Called by all threads, ends together.
void Step::normalize(const Number* scale, const Blocks& into) {
    room(inverses, into.rows);
    std::vector<float>& inverse = inverses;  // every thread finds all: quicker than to wait
    for (int row = 0; row < into.rows; row++) {
        const Number* numbers = residual + (int64_t)row * D;
        bring(numbers + 4 * D, D);  // other threads have written some of them
        inverse[row] = inverse_rms(numbers, D, model.eps);
    }
#pragma omp for schedule(static)
    for (int d = 0; d < D; d += LANES) {
        const __mmask16 mask = first(D - d);
        const __m512 factor = widened(scale + d, mask);
        for (int block = 0; block < into.count; block++) {
            Pair* to = input + ((int64_t)block * D + d) / 2 * into.size;
            for (int r = 0; r < into.rows_of(block); r++) {
                const int row = block * into.size + r;
                const __m512 numbers = widened(residual + (int64_t)row * D + d, mask);
                const __m512 normal = rounded(_mm512_mul_ps(numbers, _mm512_set1_ps(inverse[row])));
                spread(to + r, into.size, _mm512_mul_ps(normal, factor), D - d);
            }
        }
    }
}

// What the tokens see, as input of the next product. Called by all threads, ends together.
void Step::attend(const Layer& layer, const Attention& attention) {
    const int early = attention.early.size();
    if (early) {
#pragma omp for collapse(2) schedule(static)
        for (int g = 0; g < G; g++)
            for (int n = 0; n < early; n++) {
                const int token = attention.early[n], numbers = (Q + 2) * K;
                bring(qkv + (int64_t)(token + 2) * qkv_width + g * numbers, numbers);
                turn_and_keep(layer, token, g);
            }
    }
#pragma omp for schedule(static, 1)
    for (int t = 0; t < batch.threads; t++)
        for (int w = attention.first[t], end = attention.first[t + 1]; w < end; w++) {
            const Work& work = attention.work[w];
            const Span& span = batch.spans[work.span];
            if (span.length == 1 && Q <= ROWS) turn_and_keep(layer, span.start, work.group);
            mix(layer, attention, work, w + 1 < end ? &work + 1 : nullptr);
        }
}

// Turns a token's queries and key of a group to its position; stores key and value in its page.
void Step::turn_and_keep(const Layer& layer, int token, int group) {
    Number* heads = qkv + (int64_t)token * qkv_width + group * (Q + 2) * K;
    for (int q = 0; q <= Q; q++) turn(heads + q * K, positions[token]);
    const int offset = positions[token] % PAGE;
    const int64_t part = (int64_t)pages[token] * G + group;
    const Pair* key = reinterpret_cast<const Pair*>(heads + Q * K);
    Pair* to = layer.keys + part * PAGE * K / 2 + offset / LANES * LANES * K / 2 + offset % LANES;
    for (int k = 0; k < K / 2; k++) to[k * LANES] = key[k];
    if (offset % 2 && !starts[token]) return;  // the token before has stored both values
    const Number* value = heads + (Q + 1) * K;
    const Number* after = offset % 2 || ends[token] ? nullptr : value + qkv_width;
    Pair* pairs = layer.values + (part * PAGE / 2 + offset / 2) * padded;
    for (int k = 0; k < K; k += LANES) {
        const __mmask16 mask = first(K - k);
        const auto numbers = [&](const Number* from) {
            return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from + k));
        };
        __m512i pair;
        if (offset % 2) {
            const __m512i before = _mm512_loadu_si512(pairs + k);
            pair = _mm512_mask_mov_epi16(before, 0xAAAAAAAA, _mm512_slli_epi32(numbers(value), 16));
        } else {
            // A token to come counts nothing: what was there might be no number.
            pair = numbers(value);
            if (after) pair = _mm512_or_si512(pair, _mm512_slli_epi32(numbers(after), 16));
        }
        _mm512_storeu_si512(pairs + k, pair);
    }
}

void Step::turn(Number* head, int position) const {
    const int64_t place = (int64_t)position * K;
    turn_head(head, head, model.cos + place, model.sin + place, K);
}

// Has the keys and values of earlier steps that an attention will read brought closer, by each
// thread its own, as far as the processor's last cache holds them until then.
void Step::announce(const Layer& layer, const Attention& attention) const {
    stream.clear();
    const int thread = omp_get_thread_num();
    int64_t room = CARRIED / batch.threads;
    const Work* before = nullptr;
    for (int w = attention.first[thread]; w < attention.first[thread + 1] && room > 0; w++) {
        const Work& work = attention.work[w];
        const bool same = before && before->span == work.span && before->group == work.group;
        before = &work;
        if (same) continue;  // it reads what the one before reads
        const int end = batch.spans[work.span].past;
        for (int start = 0; start < end; start += PAGE) {
            const int count = std::min(PAGE, end - start);
            const int64_t key_lines = (count + LANES - 1) / LANES * (K / 2);
            const int64_t value_lines = (count + 1) / 2 * (padded / LANES);
            stream.add(keys(layer, work, start), key_lines);
            stream.add(values(layer, work, start), value_lines);
            room -= 64 * (key_lines + value_lines);
        }
    }
}

// What a work reads of the page with token `start` of its row, of parts of so many pairs; null
// beyond the row's end.
const Pair* Step::part(const Pair* memory, int pairs, const Work& work, int start) const {
    const Span& span = batch.spans[work.span];
    if (span.past + span.length <= start) return nullptr;
    const int page = batch.pages[span.pages + start / PAGE];
    return memory + ((int64_t)page * G + work.group) * pairs;
}

const Pair* Step::keys(const Layer& layer, const Work& work, int start) const {
    return part(layer.keys, K / 2 * PAGE, work, start);
}

const Pair* Step::values(const Layer& layer, const Work& work, int start) const {
    return part(layer.values, padded / 2 * PAGE, work, start);
}

// What the queries of `work` see, as input of the next product.
void Step::mix(const Layer& layer, const Attention& attention, const Work& work,
               const Work* next) {
    const Span& span = batch.spans[work.span];
    const int rows = work.rows;
    const auto token = [&](int r) { return (work.first + r) / Q; };
    const auto head = [&](int r) { return (work.first + r) % Q; };  // of the group
    const int seen = span.past + token(rows - 1) + 1;  // by the last query
    const int width = (seen + LANES - 1) / LANES * LANES;
    float* score = room(scores, (int64_t)ROWS * (width + padded));
    float* mixed = score + (int64_t)ROWS * width;
    Pair* weight = room(weights, (int64_t)ROWS * std::max(width, K) / 2);
    const auto query = [&](int r) {
        const Number* heads = qkv + (int64_t)(span.start + token(r)) * qkv_width;
        return reinterpret_cast<const Pair*>(heads + (work.group * (Q + 2) + head(r)) * K);
    };
    for (int r = 0; r < rows && rows > 1; r++) {
        const Pair* from = query(r);
        for (int k = 0, half = K / 2; k < half; k++) weight[k * rows + r] = from[k];
    }
    const Pair* queries = rows > 1 ? weight : query(0);
    for (int start = 0; start < width; start += PAGE) {
        const Columns columns{keys(layer, work, start), LANES, K / 2 * LANES};
        tiles(rows, std::min(PAGE, width - start) / LANES, queries, rows, columns, K / 2,
              score + start, width, false, next ? keys(layer, *next, start) : nullptr);
    }

    float totals[ROWS];
    const __m512 none = _mm512_set1_ps(-INFINITY), scale = _mm512_set1_ps(1 / std::sqrt((float)K));
    for (int r = 0; r < rows; r++) {
        float* own = score + (int64_t)r * width;
        const int visible = span.past + token(r) + 1;
        __m512 most = none;
        for (int s = 0; s < width; s += LANES) {
            const __m512 shown = _mm512_mask_mul_ps(none, first(visible - s), scale,
                                                    _mm512_loadu_ps(own + s));
            _mm512_storeu_ps(own + s, shown);
            most = _mm512_max_ps(most, shown);
        }
        most = _mm512_set1_ps(_mm512_reduce_max_ps(most));
        __m512 total = _mm512_setzero_ps();
        for (int s = 0; s < width; s += LANES) {
            const __m512 shown = _mm512_loadu_ps(own + s);
            const __m512 part = rounded(exponential(_mm512_sub_ps(shown, most)));
            total = _mm512_add_ps(total, part);
            spread(weight + s / 2 * rows + r, rows, part);
        }
        totals[r] = _mm512_reduce_add_ps(total);
    }

    for (int start = 0; start < seen; start += PAGE) {
        const Columns columns{values(layer, work, start), padded, LANES};
        tiles(rows, padded / LANES, weight + (int64_t)start / 2 * rows, rows, columns,
              (std::min(PAGE, seen - start) + 1) / 2, mixed, padded, start > 0,
              next ? values(layer, *next, start) : nullptr);
    }
    const Blocks& into = attention.rows;
    for (int r = 0; r < rows; r++) {
        const int row = attention.row[span.start + token(r)];
        if (row < 0) continue;
        const __m512 share = _mm512_set1_ps(1 / totals[r]);
        const int pair = (work.group * Q + head(r)) * K / 2;
        Pair* to = input + into.place(row, H * K / 2) + (int64_t)pair * into.size;
        for (int k = 0; k < K; k += LANES)
            spread(to + (int64_t)k / 2 * into.size, into.size,
                   _mm512_mul_ps(_mm512_loadu_ps(mixed + r * padded + k), share), K - k);
    }
}

}  // namespace

extern "C" void forward(const Model* model, const Batch* batch) { Step(*model, *batch).run(); }
