// Products of many rows with a matrix, both in bfloat16 or both in float32, kept in float32: what a router's logits are.
// A product of two bfloat16 is exact in float32, so that nothing is rounded before the sums are.

#include <memory>
#include <omp.h>

#include "tiles.h"

WIDE_BEGIN

namespace {

using namespace tiles;

constexpr int64_t TOGETHER = 4 * COLUMNS;  // rows of x that meet a strip of the matrix while it is in the first cache

template <class Type>
void products(const typename Type::Number *x, const typename Type::Number *matrix, int64_t n, int64_t width, int64_t out, float *to, int threads) {
    const int64_t words = width / Type::PER_WORD;
#pragma omp parallel num_threads(threads)
    {
        const std::unique_ptr<Word[]> in(new Word[words * TOGETHER]);
        const std::unique_ptr<int64_t[]> which(new int64_t[TOGETHER]);
        Found found;
#pragma omp for schedule(dynamic, 1)
        for (int64_t begin = 0; begin < n; begin += TOGETHER) {
            const int64_t size = std::min(TOGETHER, n - begin);
            for (int64_t i = 0; i < size; i++) which[i] = begin + i;
            in_panels(size, [&](int64_t p, int64_t first, int64_t columns) { pack_rows(x, width, &which[first], columns, size - first, words, &in[p * words * COLUMNS]); });
            for (int64_t row = 0; row < out; row += STRIP)
                in_panels(size, [&](int64_t p, int64_t first, int64_t columns) {
                    const auto *at = matrix + row * width;
                    strip<Type>(at, width, &in[p * words * COLUMNS], words, columns, found, row + STRIP < out ? at + STRIP * width : matrix);
                    put_columns<Float32>(found, columns, to + (begin + first) * out + row, out);
                });
        }
    }
}

}  // namespace

WIDE_END

extern "C" {

// to[n][out] = x[n][width] matrix[out][width]^T; width and out are multiples of 16.
void moekit_logits(const void *x, const void *matrix, int bits, int64_t n, int64_t width, int64_t out, float *to, int threads, int) {
    if (bits == 16) products<tiles::BFloat16>((const uint16_t *)x, (const uint16_t *)matrix, n, width, out, to, threads);
    else products<tiles::Float32>((const float *)x, (const float *)matrix, n, width, out, to, threads);
}
}
