// A step of the engine on a CPU with AVX512-BF16: tokens of many rows through all layers, with keys
// and values in pages, in one call.
//
// Everything is a product of one kernel, `tile`: a few rows times a panel of columns, both stored as
// pairs along the dimension that is summed over, which is what the instruction multiplies. Weights
// lie as panels of 32 outputs, keys as pairs of features by tokens, values as pairs of tokens by
// features, and every input of a product as blocks of rows. What a row gets does not depend on the
// rows beside it, to the bit. Numbers are rounded to bfloat16 where the trainer rounds them.
//
// Shapes: N tokens, D model width, I feed-forward width, H query heads, G key/value heads, Q query
// heads a key/value head, K head width, P tokens of a page, R rows that draw, V vocabulary.

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace {

using Number = uint16_t;  // a bfloat16
using Pair = uint32_t;    // two of them

constexpr int PAGE = 64;
constexpr int PANEL = 32;  // outputs of a panel: two vectors
constexpr int LANES = 16;
constexpr int ROWS = 14;  // most rows of a tile: 28 of 32 registers sum up

__mmask16 first(int count) { return count >= LANES ? 0xFFFF : (1u << std::max(count, 0)) - 1; }

__m512 widened(const Number* from, __mmask16 mask = 0xFFFF) {
    const __m256i numbers = _mm256_maskz_loadu_epi16(mask, from);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(numbers), 16));
}

__m256i narrowed(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }

__m512 rounded(__m512 x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrowed(x)), 16));
}

void store(Number* to, __m512 x, __mmask16 mask = 0xFFFF) {
    _mm256_mask_storeu_epi16(to, mask, narrowed(x));
}

// e^x to a unit in the last place or two: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2].
__m512 exponential(__m512 x) {
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

// sums[row][column] (+)= x[row] w[column] for M rows and 16 V columns over `pairs` pairs. x: a row's
// pairs `x_stride` apart; w: a pair's columns, `w_stride` to the next pair. ahead: memory to bring
// closer meanwhile, a line a pair, or null.
template <int M, int V>
void tile(const Pair* x, int x_stride, const Pair* w, int w_stride, int pairs, float* sums,
          int sums_stride, bool add, const char* ahead) {
    __m512 sum[M][V];
    for (int m = 0; m < M; m++)
        for (int v = 0; v < V; v++)
            sum[m][v] = add ? _mm512_loadu_ps(sums + m * sums_stride + v * LANES)
                            : _mm512_setzero_ps();
    for (int k = 0; k < pairs; k++) {
        __m512bh columns[V];
        for (int v = 0; v < V; v++)
            columns[v] = (__m512bh)_mm512_loadu_si512(w + k * (int64_t)w_stride + v * LANES);
        if (ahead) _mm_prefetch(ahead + 64 * (int64_t)k, _MM_HINT_T1);
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

using Tile = void (*)(const Pair*, int, const Pair*, int, int, float*, int, bool, const char*);
// For 1 to 14 rows: of two vectors, and of one.
const Tile TWO[ROWS] = {tile<1, 2>,  tile<2, 2>,  tile<3, 2>,  tile<4, 2>, tile<5, 2>,
                        tile<6, 2>,  tile<7, 2>,  tile<8, 2>,  tile<9, 2>, tile<10, 2>,
                        tile<11, 2>, tile<12, 2>, tile<13, 2>, tile<14, 2>};
const Tile ONE[ROWS] = {tile<1, 1>,  tile<2, 1>,  tile<3, 1>,  tile<4, 1>, tile<5, 1>,
                        tile<6, 1>,  tile<7, 1>,  tile<8, 1>,  tile<9, 1>, tile<10, 1>,
                        tile<11, 1>, tile<12, 1>, tile<13, 1>, tile<14, 1>};

// The same for any number of vectors of columns.
void tiles(int rows, int vectors, const Pair* x, int x_stride, const Pair* w, int w_stride,
           int pairs, float* sums, int sums_stride, bool add) {
    int done = 0;
    if (rows == 1)  // one row leaves room for more sums, and needs them to hide what each takes
        for (; vectors - done >= 4; done += 4)
            tile<1, 4>(x, x_stride, w + done * LANES, w_stride, pairs, sums + done * LANES,
                       sums_stride, add, nullptr);
    for (; vectors - done >= 2; done += 2)
        TWO[rows - 1](x, x_stride, w + done * LANES, w_stride, pairs, sums + done * LANES,
                      sums_stride, add, nullptr);
    if (done < vectors)
        ONE[rows - 1](x, x_stride, w + done * LANES, w_stride, pairs, sums + done * LANES,
                      sums_stride, add, nullptr);
}

// How rows lie that are an input of a product: in blocks of `size`, and in a block pair after pair.
struct Blocks {
    int rows, count, size;

    explicit Blocks(int rows)
        : rows(rows), count((rows + ROWS - 1) / ROWS), size(count ? (rows + count - 1) / count : 0) {}

    // Where pair `pair` of `row` lies.
    int64_t place(int row, int pairs, int pair = 0) const {
        return ((int64_t)(row / size) * pairs + pair) * size + row % size;
    }
    int64_t length(int pairs) const { return (int64_t)count * size * pairs; }
};

}  // namespace

extern "C" {

// Shared with cpu_decoder.py, field by field.
struct Matrix {
    const Pair* panels;  // [O / 32, I / 2, 32]
    const float* bias;   // [O] or null
    int32_t outputs, pairs;
};

struct Layer {
    Matrix qkv, o, gate_up, down;  // gate_up: 16 outputs of either in a panel
    const Number *attention_norm, *feed_forward_norm;
    Pair* keys;      // [pages, G, K / 2, P] pairs
    Number* values;  // [pages, G, P / 2, K up to a multiple of 16] pairs
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
    const int32_t* drawing;  // tokens that draw, rising
    Number* logits;          // [R, V]
    int32_t token_count, span_count, drawing_count, threads;
};
}

namespace {

// Part of an attention: up to 14 of the queries of one key/value head of a span, counted by token
// and then by head.
struct Work {
    int32_t span, group, first, rows;
};

class Step {
   public:
    Step(const Model& model, const Batch& batch);
    void run();

   private:
    void attend(const Layer& layer, const Work& work, const Blocks& into, const int32_t* row_of);
    void normalize(const Number* x, const Number* scale, const Blocks& into);
    void turn_and_keep(const Layer& layer, int token);
    void turn(Number* head, int position) const;
    template <class Take>
    void multiply(const Matrix& matrix, const Blocks& rows, const Pair* x, Take take);
    void add(const Matrix& matrix, const Blocks& rows, const Pair* x);
    void plan_attention(bool drawing_only, std::vector<Work>& work) const;

    const Model& model;
    const Batch& batch;
    const int Q, K, H, G, D, qkv_width;
    const Blocks all, drawing;
    std::vector<int32_t> itself, row_of;  // row of a token: in the batch, and among those that draw
    std::vector<int32_t> positions, pages;  // of the tokens: place in the text, and page
    std::vector<char> ends;                 // whether it is the last one of its span
    std::vector<Work> work, last_work;
    // Kept from step to step, since new memory costs more than what is done with it.
    static thread_local std::vector<Number> residual_, qkv_;
    static thread_local std::vector<Pair> input_, wide_;
    static thread_local std::vector<float> scores_;
    static thread_local std::vector<Pair> weights_;
    Number *residual, *qkv;
    Pair *input, *wide;
};

thread_local std::vector<Number> Step::residual_, Step::qkv_;
thread_local std::vector<Pair> Step::input_, Step::wide_, Step::weights_;
thread_local std::vector<float> Step::scores_;

template <class T>
T* room(std::vector<T>& memory, int64_t count) {
    if ((int64_t)memory.size() < count) memory.resize(count);
    return memory.data();
}

Step::Step(const Model& model, const Batch& batch)
    : model(model), batch(batch), Q(model.heads / model.groups), K(model.head_width),
      H(model.heads), G(model.groups), D(model.width), qkv_width((H + 2 * G) * K),
      all(batch.token_count), drawing(batch.drawing_count), itself(batch.token_count),
      row_of(batch.token_count, -1) {
    for (int n = 0; n < batch.token_count; n++) itself[n] = n;
    for (int s = 0; s < batch.span_count; s++)
        for (int n = 0; n < batch.spans[s].length; n++) {
            positions.push_back(batch.spans[s].past + n);
            ends.push_back(n == batch.spans[s].length - 1);
            pages.push_back(batch.pages[batch.spans[s].pages + positions.back() / PAGE]);
        }
    for (int r = 0; r < batch.drawing_count; r++) row_of[batch.drawing[r]] = r;
    plan_attention(false, work);
    plan_attention(true, last_work);
    const int inner = model.layers[0].down.pairs;
    residual = room(residual_, (int64_t)batch.token_count * D);
    qkv = room(qkv_, (int64_t)batch.token_count * qkv_width);
    input = room(input_, all.length(std::max(D, H * K) / 2));
    wide = room(wide_, all.length(inner));
}

void Step::plan_attention(bool drawing_only, std::vector<Work>& work) const {
    for (int s = 0; s < batch.span_count; s++) {
        const Span& span = batch.spans[s];
        const auto drawn = [&](int n) { return row_of[span.start + n] >= 0; };
        for (int first = 0; first < span.length * Q; first += ROWS) {
            const int rows = std::min(ROWS, span.length * Q - first);
            bool wanted = !drawing_only;
            for (int r = first; r < first + rows && !wanted; r++) wanted = drawn(r / Q);
            for (int g = 0; wanted && g < G; g++) work.push_back({s, g, first, rows});
        }
    }
}

void Step::run() {
#pragma omp parallel num_threads(batch.threads)
    {
#pragma omp for schedule(static)
        for (int n = 0; n < batch.token_count; n++)
            std::copy_n(model.embeddings + batch.tokens[n] * D, D, residual + (int64_t)n * D);
        for (int l = 0; l < model.depth; l++) {
            const Layer& layer = model.layers[l];
            const bool last = l == model.depth - 1;
            normalize(residual, layer.attention_norm, all);
            multiply(layer.qkv, all, input, [&](int row, int column, const float* sums) {
                const int count = std::min(PANEL, qkv_width - column);
                Number* to = qkv + (int64_t)row * qkv_width + column;
                store(to, _mm512_loadu_ps(sums), first(count));
                store(to + LANES, _mm512_loadu_ps(sums + LANES), first(count - LANES));
            });
#pragma omp for schedule(static)
            for (int n = 0; n < batch.token_count; n++) turn_and_keep(layer, n);
            const std::vector<Work>& todo = last ? last_work : work;
            const Blocks& rows = last ? drawing : all;
            const int count = todo.size();
#pragma omp for schedule(dynamic, 4)
            for (int w = 0; w < count; w++)
                attend(layer, todo[w], rows, (last ? row_of : itself).data());
            if (last) {  // nothing is computed any more for tokens that nothing is drawn after
#pragma omp single
                for (int r = 0; r < batch.drawing_count; r++)
                    if (r != batch.drawing[r])
                        std::copy_n(residual + (int64_t)batch.drawing[r] * D, D,
                                    residual + (int64_t)r * D);
            }
            add(layer.o, rows, input);
            normalize(residual, layer.feed_forward_norm, rows);
            const int inner = layer.down.pairs;
            multiply(layer.gate_up, rows, input, [&](int row, int column, const float* sums) {
                const __m512 gate = rounded(_mm512_loadu_ps(sums));
                const __m512 up = rounded(_mm512_loadu_ps(sums + LANES));
                const __m512 one = _mm512_set1_ps(1);
                const __m512 e = exponential(_mm512_sub_ps(_mm512_setzero_ps(), gate));
                const __m512 silu = rounded(_mm512_div_ps(gate, _mm512_add_ps(one, e)));
                alignas(64) Number product[LANES];
                store(product, _mm512_mul_ps(silu, up));
                const Pair* pairs = reinterpret_cast<const Pair*>(product);
                const int start = column / 4;  // of pairs: half of the panel's columns are gates
                for (int j = 0; j < std::min(LANES / 2, inner - start); j++)
                    wide[rows.place(row, inner, start + j)] = pairs[j];
            });
            add(layer.down, rows, wide);
        }
        normalize(residual, model.norm, drawing);
        multiply(model.head, drawing, input, [&](int row, int column, const float* sums) {
            const int count = std::min(PANEL, model.head.outputs - column);
            Number* to = batch.logits + (int64_t)row * model.head.outputs + column;
            store(to, _mm512_loadu_ps(sums), first(count));
            store(to + LANES, _mm512_loadu_ps(sums + LANES), first(count - LANES));
        });
    }
}

// Hands over every row of x W^T + b, 32 columns at a time. Called by all threads, ends together.
template <class Take>
void Step::multiply(const Matrix& matrix, const Blocks& rows, const Pair* x, Take take) {
    const int panels = (matrix.outputs + PANEL - 1) / PANEL, pairs = matrix.pairs;
#pragma omp for schedule(static)
    for (int unit = 0; unit < panels * rows.count; unit++) {
        const int panel = unit / rows.count, block = unit % rows.count;
        const int start = block * rows.size, count = std::min(rows.size, rows.rows - start);
        const Pair* w = matrix.panels + (int64_t)panel * pairs * PANEL;
        const Pair* next = w + (int64_t)(pairs + block * pairs / 2) * PANEL;
        alignas(64) float sums[ROWS * PANEL];
        TWO[count - 1](x + (int64_t)start * pairs, rows.size, w, PANEL, pairs, sums, PANEL, false,
                       block < 2 ? reinterpret_cast<const char*>(next) : nullptr);
        for (int r = 0; r < count; r++) {
            if (matrix.bias)
                for (int c = 0; c < PANEL; c++) sums[r * PANEL + c] += matrix.bias[panel * PANEL + c];
            take(start + r, panel * PANEL, sums + r * PANEL);
        }
    }
}

// The residual stream plus a product.
void Step::add(const Matrix& matrix, const Blocks& rows, const Pair* x) {
    multiply(matrix, rows, x, [&](int row, int column, const float* sums) {
        for (int c = 0; c < PANEL; c += LANES) {
            const __mmask16 mask = first(D - column - c);
            Number* to = residual + (int64_t)row * D + column + c;
            const __m512 product = rounded(_mm512_loadu_ps(sums + c));
            store(to, _mm512_add_ps(widened(to, mask), product), mask);
        }
    });
}

// The next product's input: rows by their root mean square, times the scale.
void Step::normalize(const Number* x, const Number* scale, const Blocks& into) {
#pragma omp for schedule(static)
    for (int row = 0; row < into.rows; row++) {
        const Number* from = x + (int64_t)row * D;
        __m512 squares = _mm512_setzero_ps();
        for (int d = 0; d < D; d += LANES) {
            const __m512 numbers = widened(from + d, first(D - d));
            squares = _mm512_fmadd_ps(numbers, numbers, squares);
        }
        const float inverse = 1 / std::sqrt(_mm512_reduce_add_ps(squares) / D + model.eps);
        for (int d = 0; d < D; d += LANES) {
            const __mmask16 mask = first(D - d);
            const __m512 normal = _mm512_mul_ps(widened(from + d, mask), _mm512_set1_ps(inverse));
            alignas(64) Number scaled[LANES];
            store(scaled, _mm512_mul_ps(rounded(normal), widened(scale + d, mask)));
            const Pair* pairs = reinterpret_cast<const Pair*>(scaled);
            Pair* to = input + into.place(row, D / 2, d / 2);
            for (int j = 0; j < std::min(LANES, D - d) / 2; j++) to[j * into.size] = pairs[j];
        }
    }
}

// Turns a token's queries and keys to its position and stores keys and values in its page.
void Step::turn_and_keep(const Layer& layer, int token) {
    Number* heads = qkv + (int64_t)token * qkv_width;
    for (int h = 0; h < H + G; h++) turn(heads + h * K, positions[token]);
    const int page = pages[token], offset = positions[token] % PAGE;
    const int padded = (K + LANES - 1) / LANES * LANES;
    for (int g = 0; g < G; g++) {
        const Pair* key = reinterpret_cast<const Pair*>(heads + (H + g) * K);
        Pair* to = layer.keys + ((int64_t)page * G + g) * (K / 2) * PAGE + offset;
        for (int k = 0; k < K / 2; k++) to[k * PAGE] = key[k];
        const Number* value = heads + (H + G + g) * K;
        Number* half = layer.values + ((int64_t)page * G + g) * PAGE * padded +
                       offset / 2 * 2 * padded + offset % 2;
        for (int k = 0; k < K; k++) half[2 * k] = value[k];
        // A token to come, of the same pair, counts nothing: what is there might be no number.
        if (offset % 2 == 0 && ends[token])
            for (int k = 0; k < K; k++) half[2 * k + 1] = 0;
    }
}

void Step::turn(Number* head, int position) const {
    const Number *cos = model.cos + (int64_t)position * K, *sin = model.sin + (int64_t)position * K;
    const int half = K / 2;
    for (int k = 0; k < half; k += LANES) {
        const __mmask16 mask = first(half - k);
        const __m512 a = widened(head + k, mask), b = widened(head + half + k, mask);
        const auto turned = [&](__m512 own, __m512 other, int at) {
            const __m512 product = rounded(_mm512_mul_ps(own, widened(cos + at, mask)));
            return _mm512_fmadd_ps(other, widened(sin + at, mask), product);
        };
        store(head + k, turned(a, b, k), mask);
        store(head + half + k, turned(b, a, half + k), mask);
    }
}

// What up to 14 queries of one key/value head see, as input of the next product.
void Step::attend(const Layer& layer, const Work& work, const Blocks& into, const int32_t* row_of) {
    const Span& span = batch.spans[work.span];
    const int32_t* pages = batch.pages + span.pages;
    const int rows = work.rows, padded = (K + LANES - 1) / LANES * LANES;
    const auto token = [&](int r) { return (work.first + r) / Q; };
    const auto head = [&](int r) { return work.group * Q + (work.first + r) % Q; };
    const int seen = span.past + token(rows - 1) + 1;  // by the last query
    const int width = (seen + LANES - 1) / LANES * LANES;
    float* scores = room(scores_, (int64_t)ROWS * (width + padded));
    float* mixed = scores + (int64_t)ROWS * width;
    Pair* weights = room(weights_, (int64_t)ROWS * std::max(width, K) / 2);

    Pair* queries = weights;
    for (int r = 0; r < rows; r++) {
        const Number* numbers = qkv + (int64_t)(span.start + token(r)) * qkv_width + head(r) * K;
        const Pair* from = reinterpret_cast<const Pair*>(numbers);
        for (int k = 0; k < K / 2; k++) queries[k * rows + r] = from[k];
    }
    for (int start = 0; start < width; start += PAGE) {
        const int64_t at = (int64_t)pages[start / PAGE] * G + work.group;
        const int vectors = std::min(PAGE, width - start) / LANES;
        tiles(rows, vectors, queries, rows, layer.keys + at * (K / 2) * PAGE, PAGE, K / 2,
              scores + start, width, false);
    }

    float totals[ROWS];
    const __m512 none = _mm512_set1_ps(-INFINITY), scale = _mm512_set1_ps(1 / std::sqrt((float)K));
    for (int r = 0; r < rows; r++) {
        float* own = scores + (int64_t)r * width;
        const int visible = span.past + token(r) + 1;
        __m512 most = none;
        for (int s = 0; s < width; s += LANES) {
            const __m512 score = _mm512_mul_ps(_mm512_loadu_ps(own + s), scale);
            const __m512 shown = _mm512_mask_mov_ps(none, first(visible - s), score);
            _mm512_storeu_ps(own + s, shown);
            most = _mm512_max_ps(most, shown);
        }
        most = _mm512_set1_ps(_mm512_reduce_max_ps(most));
        __m512 total = _mm512_setzero_ps();
        for (int s = 0; s < width; s += LANES) {
            const __m512 shown = _mm512_loadu_ps(own + s);
            const __m512 weight = rounded(exponential(_mm512_sub_ps(shown, most)));
            total = _mm512_add_ps(total, weight);
            alignas(64) Number numbers[LANES];
            store(numbers, weight);
            const Pair* from = reinterpret_cast<const Pair*>(numbers);
            for (int j = 0; j < LANES / 2; j++) weights[(s / 2 + j) * rows + r] = from[j];
        }
        totals[r] = _mm512_reduce_add_ps(total);
    }

    for (int start = 0; start < seen; start += PAGE) {
        const int64_t at = (int64_t)pages[start / PAGE] * G + work.group;
        const int pairs = (std::min(PAGE, seen - start) + 1) / 2;
        tiles(rows, padded / LANES, weights + (int64_t)start / 2 * rows, rows,
              reinterpret_cast<const Pair*>(layer.values) + at * (PAGE / 2) * padded, padded, pairs, mixed, padded, start > 0);
    }
    for (int r = 0; r < rows; r++) {
        const int row = row_of[span.start + token(r)];
        if (row < 0) continue;
        const __m512 share = _mm512_set1_ps(1 / totals[r]);
        Pair* to = input + into.place(row, H * K / 2, head(r) * K / 2);
        for (int k = 0; k < K; k += LANES) {
            alignas(64) Number numbers[LANES];
            store(numbers, _mm512_mul_ps(_mm512_loadu_ps(mixed + r * padded + k), share));
            const Pair* from = reinterpret_cast<const Pair*>(numbers);
            for (int j = 0; j < std::min(LANES, K - k) / 2; j++)
                to[(int64_t)(k / 2 + j) * into.size] = from[j];
        }
    }
}

}  // namespace

extern "C" void forward(const Model* model, const Batch* batch) { Step(*model, *batch).run(); }
