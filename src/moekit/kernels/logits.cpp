// Products of many rows with a matrix, both in bfloat16 or both in float32, kept in float32: what a router's logits are.
// A product of two bfloat16 is exact in float32, so that nothing is rounded before the sums are. What follows from them, and
// their gradients.

#include <omp.h>

#include "broad.h"
#include "choice.h"

WIDE_BEGIN

namespace {

using namespace tiles;

constexpr int64_t TOGETHER = 3 * COLUMNS;  // rows of x that meet a strip of the matrix while it is in the first cache, with products that stay in the second
constexpr int64_t ROWS_AT_ONCE = 256;      // of x and its products whose gradients are formed together,
constexpr int64_t COLUMNS_AT_ONCE = 256;   // and columns of x: packed, they stay in the second cache

// Stores n numbers, whole vectors, past the caches if they begin with a line; `_mm_sfence` must follow.
void put_away(const float *from, int64_t n, float *to) {
    const bool lines = (uintptr_t)to % LINE == 0;
    for (int64_t i = 0; i < n; i += LANES) {
        const __m512 numbers[] = {_mm512_loadu_ps(from + i)};
        Float32::store(to + i, numbers, lines);
    }
}

// then(row, products, room) is called for each row of x with its products, while they are in the second cache, and room for
// three times as many numbers.
template <class Type, class Then>
void products(const typename Type::Number *x, const typename Type::Number *matrix, int64_t n, int64_t width, int64_t out, int threads, const Then &then) {
    using Number = typename Type::Number;
    const int64_t words = width / Type::PER_WORD;
#pragma omp parallel num_threads(threads)
    {
        rows::Buffer<Word> in(words * TOGETHER);
        rows::Buffer<float> to(out * TOGETHER), room(3 * out);
        alignas(LINE) Found found;
#pragma omp for schedule(dynamic, 1)
        for (int64_t begin = 0; begin < n; begin += TOGETHER) {
            const int64_t size = std::min(TOGETHER, n - begin);
            in_panels(size, [&](int64_t p, int64_t first, int64_t columns) { pack_rows<COLUMNS, Number>({x + (begin + first) * width, width, nullptr}, columns, size - first, words, &in[p * words * COLUMNS]); });
            for (int64_t row = 0; row < out; row += STRIP)
                in_panels(size, [&](int64_t p, int64_t first, int64_t columns) {
                    const auto *at = matrix + row * width;
                    strip<Type>(at, width, &in[p * words * COLUMNS], words, columns, found, row + STRIP < out ? at + STRIP * width : matrix, nullptr);
                    put_columns<Float32>(found, columns, &to[first * out + row], out);
                });
            for (int64_t i = 0; i < size; i++) then(begin + i, &to[i * out], room.data());
            _mm_sfence();
        }
    }
}

template <class Then>
void products_of(const void *x, const void *matrix, int bits, int64_t n, int64_t width, int64_t out, int threads, const Then &then) {
    if (bits == 16) products<BFloat16>((const uint16_t *)x, (const uint16_t *)matrix, n, width, out, threads, then);
    else products<Float32>((const float *)x, (const float *)matrix, n, width, out, threads, then);
}

// to[n][width] = grad[n][out] matrix[out][width], by as many threads as come.
template <class Type, class Number>
void of_rows(const Number *matrix, const Number *grad, int64_t n, int64_t width, int64_t out, Number *to) {
    const int64_t words = out / Type::PER_WORD, blocks = (n + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE, parts = (width + BROAD - 1) / BROAD;
    rows::Buffer<Word> panel(BROAD * words);
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t task = 0; task < blocks * parts; task++) {
        const int64_t begin = task % blocks * ROWS_AT_ONCE, d = task / blocks * BROAD, columns = std::min<int64_t>(BROAD, width - d);
        in_strips(std::min(ROWS_AT_ONCE, n - begin), columns, [&](int64_t s, int64_t r, int64_t rows) {
            const Number *own = grad + (begin + r) * out;
            broad<Type, Type>(Left{(const Word *)own, words, nullptr}, rows, {panel.data(), s ? nullptr : matrix + d, width}, words, columns, {to + (begin + r) * width + d, width, false}, {(const char *)(own + rows * out), LINE, UINT32_MAX}, nullptr);
        });
    }
}

// Rows [from, from + n_rows) of to[out][width] = grad[n][out]^T x[n][width], from column d on: sums in float32 of blocks of
// rows, whatever the threads.
template <class Type, class Number>
void of_matrix_part(const Number *x, const Number *grad, int64_t n, int64_t width, int64_t out, int64_t from, int64_t n_rows, int64_t d, Number *to) {
    constexpr int64_t WORDS = ROWS_AT_ONCE / Type::PER_WORD;
    rows::Buffer<Word> own(WORDS * BROAD), panels(WORDS * COLUMNS_AT_ONCE);
    rows::Buffer<float> sums(n_rows * COLUMNS_AT_ONCE, 0.0f);
    const int64_t columns = std::min(COLUMNS_AT_ONCE, width - d);
    for (int64_t begin = 0; begin < n; begin += ROWS_AT_ONCE) {
        const int64_t rows = std::min(ROWS_AT_ONCE, n - begin), words = up_to(rows, Type::PER_WORD) / Type::PER_WORD;
        pack_columns<Type>({x + begin * width, width, nullptr}, rows, d, columns, panels.data());
        for (int64_t l = 0; l < n_rows; l += BROAD) {
            const int64_t n_left = std::min<int64_t>(BROAD, n_rows - l);
            pack_columns<Type>({grad + begin * out, out, nullptr}, rows, from + l, n_left, own.data());
            for (int64_t p = 0; p < columns; p += BROAD)
                in_strips(n_left, columns - p, [&](int64_t, int64_t r, int64_t n_strip) {
                    float *at = sums.data() + (l + r) * COLUMNS_AT_ONCE + p;
                    broad<Type, Added>(Columns{own.data() + r}, n_strip, {panels.data() + p * words}, words, columns - p, {at, COLUMNS_AT_ONCE, false}, {}, nullptr);
                });
        }
    }
    for (int64_t row = 0; row < n_rows; row++)
        for (int64_t c = 0; c < columns; c += LANES) Type::store(to + (from + row) * width + d + c, _mm512_loadu_ps(sums.data() + row * COLUMNS_AT_ONCE + c));
}

template <class Type, class Number>
void gradients(const Number *x, const Number *matrix, const Number *grad, int64_t n, int64_t width, int64_t out, Number *of_x, Number *of_matrix, int threads) {
    const int64_t share = up_to((out + threads - 1) / threads, LANES);
#pragma omp parallel num_threads(threads)
    {
        of_rows<Type>(matrix, grad, n, width, out, of_x);
#pragma omp for schedule(dynamic, 1) collapse(2)
        for (int64_t d = 0; d < width; d += COLUMNS_AT_ONCE)
            for (int64_t from = 0; from < out; from += share) of_matrix_part<Type>(x, grad, n, width, out, from, std::min(share, out - from), d, of_matrix);
    }
}

}  // namespace

WIDE_END

extern "C" {

// to[n][out] = x[n][width] matrix[out][width]^T; width and out are multiples of 16.
void moekit_logits(const void *x, const void *matrix, int bits, int64_t n, int64_t width, int64_t out, float *to, int threads, int) {
    products_of(x, matrix, bits, n, width, out, threads, [=](int64_t row, const float *found, float *) { put_away(found, out, to + row * out); });
}

// Such logits of n tokens, and the scores, experts and weights that follow from them.
void moekit_choose(const void *x, const void *centroids, int bits, int64_t n, int64_t width, const moekit_choice *choice, float *logits, float *scores, int64_t *experts, float *weights, int threads, int level) {
    const int64_t out = choice->n_experts, top_k = choice->top_k;
    products_of(x, centroids, bits, n, width, out, threads, [=](int64_t t, const float *own, float *room) {
        choice::choose(*choice, own, room, experts + t * top_k, weights + t * top_k, room + out, level);
        put_away(own, out, logits + t * out);
        put_away(room, out, scores + t * out);
    });
}

// Where `grad` is the gradient of such a product: that of x, grad matrix, and of the matrix, grad^T x. All are of one type.
void moekit_logits_backward(const void *x, const void *matrix, const void *grad, int bits, int64_t n, int64_t width, int64_t out, void *of_x, void *of_matrix, int threads, int) {
    using namespace tiles;
    if (bits == 16) gradients<BFloat16>((const uint16_t *)x, (const uint16_t *)matrix, (const uint16_t *)grad, n, width, out, (uint16_t *)of_x, (uint16_t *)of_matrix, threads);
    else gradients<Float32>((const float *)x, (const float *)matrix, (const float *)grad, n, width, out, (float *)of_x, (float *)of_matrix, threads);
}
}
