// Causal attention and its gradients, one head of a row at a time; weights of a few queries exist
// at once (FlashAttention 2, Dao 2023).
//
// Shapes: B rows, T tokens, H heads, K head width.

#include <cmath>

#include "packing.hpp"

extern "C" {

// The same as in operators.py, field by field. Numbers are [B, T, H, K], `logs` [B, H, T]: the
// logarithm of each query's sum of exponentials.
struct Heads {
    const Number *query, *key, *value;
    Number* mixed;
    float* logs;
    const Number* grad_mixed;
    Number *grad_query, *grad_key, *grad_value;
    int32_t rows, tokens, heads, width, threads;
};
}

namespace {

constexpr int QUERIES = 4 * ROWS;  // that are added to the gradients of keys and values together

int up(int count) { return (count + LANES - 1) / LANES * LANES; }

// One head of a row.
class Head {
   public:
    Head(const Heads& all, int row, int head)
        : T(all.tokens), K(all.width), pairs((K + 1) / 2), padded(up(K)),
          stride((int64_t)all.heads * K), at(((int64_t)row * T * all.heads + head) * K),
          logs(all.logs + ((int64_t)row * all.heads + head) * T), all(all),
          scale(1 / std::sqrt((float)K)) {}

    void mix() const;
    void differentiate() const;

   private:
    Table tokens(const Number* numbers, int start, int count) const {
        return {numbers + at + start * stride, stride, count, K};
    }
    // All tokens as columns of a product, 16 in a panel.
    Columns beside(const Number* numbers, Kept& kept) const {
        Pair* to = kept.room<Pair>((int64_t)up(T) * pairs);
        for (int t = 0; t < T; t += LANES)
            pack_rows(to + (int64_t)t * pairs, LANES, tokens(numbers, 0, T), t, LANES);
        return {to, LANES, pairs * LANES};
    }
    // Their features as columns of a product that is summed over tokens.
    Columns features(const Number* numbers, int start, int count, Kept& kept) const {
        Pair* to = kept.room<Pair>((int64_t)(count + 1) / 2 * padded);
        pack_columns(to, padded, tokens(numbers, start, count), 0, padded);
        return {to, padded, LANES};
    }
    // sums [rows of x, width] = the product of x and `columns`.
    void product(const Table& x, const Columns& columns, int width, float* sums) const {
        const int length = (x.columns + 1) / 2;
        Pair* packed = inputs.room<Pair>((int64_t)length * x.rows);
        pack_rows(packed, x.rows, x, 0, x.rows);
        tiles(x.rows, width / LANES, packed, x.rows, columns, length, sums, width, false, nullptr);
    }
    void write(Number* to, int token, const float* numbers, float scale) const {
        for (int k = 0; k < K; k += LANES)
            store(to + at + token * stride + k,
                  _mm512_mul_ps(_mm512_loadu_ps(numbers + k), _mm512_set1_ps(scale)), first(K - k));
    }
    void errors_of(int start, int count, const Columns& keys, const Columns& values, int width,
                   Number* weights, Number* errors) const;

    const int T, K, pairs, padded;
    const int64_t stride, at;
    float* const logs;
    const Heads& all;
    const float scale;

    static thread_local Kept inputs;
};

thread_local Kept Head::inputs;

void Head::mix() const {
    static thread_local Kept key_room, value_room, score_room, weight_room, sum_room;
    const Columns keys = beside(all.key, key_room), values = features(all.value, 0, T, value_room);
    float* scores = score_room.room<float>((int64_t)ROWS * up(T));
    Number* weights = weight_room.room<Number>((int64_t)ROWS * up(T));
    float* sums = sum_room.room<float>(ROWS * padded);
    const __m512 none = _mm512_set1_ps(-INFINITY);
    for (int start = 0; start < T; start += ROWS) {
        const int count = std::min(ROWS, T - start), seen = start + count, width = up(seen);
        product(tokens(all.query, start, count), keys, width, scores);
        float totals[ROWS];
        for (int r = 0; r < count; r++) {
            float* own = scores + (int64_t)r * width;
            const int visible = start + r + 1;
            __m512 most = none;
            for (int s = 0; s < visible; s += LANES)
                most = _mm512_mask_max_ps(most, first(visible - s), most, _mm512_loadu_ps(own + s));
            const float highest = scale * _mm512_reduce_max_ps(most);
            __m512 total = _mm512_setzero_ps();
            for (int s = 0; s < width; s += LANES) {
                const __m512 less = _mm512_fmsub_ps(_mm512_loadu_ps(own + s), _mm512_set1_ps(scale),
                                                    _mm512_set1_ps(highest));
                const __m512 part =
                    _mm512_maskz_mov_ps(first(visible - s), rounded(exponential(less)));
                total = _mm512_add_ps(total, part);
                store(weights + (int64_t)r * width + s, part);
            }
            totals[r] = _mm512_reduce_add_ps(total);
            logs[start + r] = highest + std::log(totals[r]);
        }
        product({weights, width, count, seen}, values, padded, sums);
        for (int r = 0; r < count; r++)
            write(all.mixed, start + r, sums + r * padded, 1 / totals[r]);
    }
}

// Weights [count, width] of some queries, and the gradients of their scores.
void Head::errors_of(int start, int count, const Columns& keys, const Columns& values, int width,
                     Number* weights, Number* errors) const {
    static thread_local Kept score_room, slope_room;
    float* scores = score_room.room<float>((int64_t)ROWS * width);
    float* slopes = slope_room.room<float>((int64_t)ROWS * width);
    product(tokens(all.query, start, count), keys, width, scores);
    product(tokens(all.grad_mixed, start, count), values, width, slopes);
    for (int r = 0; r < count; r++) {
        const int64_t token = at + (start + r) * stride;
        __m512 along = _mm512_setzero_ps();
        for (int k = 0; k < K; k += LANES)
            along = _mm512_fmadd_ps(widened(all.mixed + token + k, first(K - k)),
                                    widened(all.grad_mixed + token + k, first(K - k)), along);
        const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(along));
        const __m512 log = _mm512_set1_ps(logs[start + r]), factor = _mm512_set1_ps(scale);
        for (int s = 0; s < width; s += LANES) {
            const int64_t place = (int64_t)r * width + s;
            const __m512 less = _mm512_fmsub_ps(_mm512_loadu_ps(scores + place), factor, log);
            const __m512 weight =
                _mm512_maskz_mov_ps(first(start + r + 1 - s), exponential(less));
            const __m512 slope = _mm512_sub_ps(_mm512_loadu_ps(slopes + place), mean);
            store(weights + place, weight);
            store(errors + place, _mm512_mul_ps(_mm512_mul_ps(weight, slope), factor));
        }
    }
}

void Head::differentiate() const {
    static thread_local Kept key_room, value_room, feature_room, query_room, grad_room;
    static thread_local Kept weight_room, error_room, sum_room, grad_keys, grad_values;
    const Columns keys = beside(all.key, key_room), values = beside(all.value, value_room);
    const Columns key_features = features(all.key, 0, T, feature_room);
    Number* weights = weight_room.room<Number>((int64_t)QUERIES * up(T));
    Number* errors = error_room.room<Number>((int64_t)QUERIES * up(T));
    float* sums = sum_room.room<float>(ROWS * padded);
    float* to_keys = grad_keys.room<float>((int64_t)T * padded);
    float* to_values = grad_values.room<float>((int64_t)T * padded);
    // From the last queries on, which see all keys.
    for (int start = (T - 1) / QUERIES * QUERIES; start >= 0; start -= QUERIES) {
        const int count = std::min(QUERIES, T - start), seen = start + count, width = up(seen);
        for (int q = 0; q < count; q += ROWS) {
            const int here = std::min(ROWS, count - q);
            Number* own = errors + (int64_t)q * width;
            errors_of(start + q, here, keys, values, width, weights + (int64_t)q * width, own);
            product({own, width, here, seen}, key_features, padded, sums);
            for (int r = 0; r < here; r++)
                write(all.grad_query, start + q + r, sums + r * padded, 1);
        }
        const Columns queries = features(all.query, start, count, query_room);
        const Columns grads = features(all.grad_mixed, start, count, grad_room);
        const int half = (count + 1) / 2;
        for (int key = 0; key < seen; key += ROWS) {
            const int here = std::min(ROWS, seen - key);
            const auto add = [&](const Number* numbers, const Columns& columns, float* to) {
                Pair* x = inputs.room<Pair>((int64_t)half * here);
                pack_columns(x, here, {numbers, width, count, seen}, key, here);
                tiles(here, padded / LANES, x, here, columns, half, to + (int64_t)key * padded,
                      padded, seen < T, nullptr);
            };
            add(errors, queries, to_keys);
            add(weights, grads, to_values);
        }
    }
    for (int t = 0; t < T; t++) {
        write(all.grad_key, t, to_keys + (int64_t)t * padded, 1);
        write(all.grad_value, t, to_values + (int64_t)t * padded, 1);
    }
}

}  // namespace

// Fills `mixed` and `logs`.
extern "C" void attend(const Heads* heads) {
#pragma omp parallel for collapse(2) schedule(dynamic, 1) num_threads(heads->threads)
    for (int row = 0; row < heads->rows; row++)
        for (int head = 0; head < heads->heads; head++) Head(*heads, row, head).mix();
}

// Fills the three gradients.
extern "C" void attend_back(const Heads* heads) {
#pragma omp parallel for collapse(2) schedule(dynamic, 1) num_threads(heads->threads)
    for (int row = 0; row < heads->rows; row++)
        for (int head = 0; head < heads->heads; head++) Head(*heads, row, head).differentiate();
}
