// Four bfloat16 matrices side by side, for AVX512. Each is short: where one follows the other, memory is slow at every
// beginning; of four, some are always on their way.

#include "side_by_side.h"
#include "wide.h"

namespace rows {
namespace {

constexpr int CHAINS = 4;              // sums of a row that are on their way at once
constexpr int64_t PIECE = 32 * CHAINS;  // numbers of a row that are read before it is the next matrix's turn

template <Cache CACHE>
AVX512 inline __attribute__((always_inline)) __m512 plus_product(__m512 total, const uint8_t *row, const uint8_t *ahead, const uint16_t *x) {
    ask_in<CACHE>(ahead);
    return _mm512_dpbf16_ps(total, (__m512bh)_mm512_loadu_si512(row), (__m512bh)_mm512_loadu_si512(x));
}

// Rows of V vectors; all or none of them are inside. The sums stay in registers: see short_rows.
template <int V, Cache CACHE>
AVX512 void added_avx512(const Four &four, const uint16_t *const *x, const float *weights, float *found) {
    const uint8_t *const *ahead = four.inside > 0 ? four.ahead : four.after;
    __m512 sums[TOGETHER];
#pragma GCC unroll 16
    for (int64_t one = 0; one < TOGETHER; one++) {
        const int64_t at = one * four.stride;
        sums[one] = _mm512_setzero_ps();
        for (int m = 0; m < SIDE; m++) {
            __m512 total = _mm512_setzero_ps();
            for (int v = 0; v < V; v++)
                total = plus_product<CACHE>(total, four.rows[m] + at + 64 * v, ahead[m] + at + 64 * v, x[m] + 32 * v);
            sums[one] = _mm512_fmadd_ps(_mm512_set1_ps(weights[m]), total, sums[one]);
        }
    }
    wide::store_sums(found, sums, TOGETHER);
}

template <Cache CACHE>
AVX512 void apart_avx512(const Four &four, int64_t count, const uint16_t *x, float *const *found) {
    __m512 sums[SIDE][TOGETHER];
    for (int64_t one = 0; one < count; one++) {
        const uint8_t *const *ahead = one < four.inside ? four.ahead : four.after;
        __m512 total[SIDE][CHAINS];
        for (int m = 0; m < SIDE; m++)
            for (int c = 0; c < CHAINS; c++) total[m][c] = _mm512_setzero_ps();
        for (int64_t i = 0; i < four.in; i += PIECE)
            for (int m = 0; m < SIDE; m++)
                for (int c = 0; c < CHAINS; c++) {
                    const int64_t number = i + 32 * c, at = one * four.stride + 2 * number;
                    if (number < four.in)
                        total[m][c] = plus_product<CACHE>(total[m][c], four.rows[m] + at, ahead[m] + at, x + number);
                }
        for (int m = 0; m < SIDE; m++) {
            for (int c = 1; c < CHAINS; c++) total[m][0] = _mm512_add_ps(total[m][0], total[m][c]);
            sums[m][one] = total[m][0];
        }
    }
    for (int m = 0; m < SIDE; m++) wide::store_sums(found[m], sums[m], count);
}

using Added = void (*)(const Four &, const uint16_t *const *x, const float *weights, float *found);
// By the vectors of a row.
template <Cache CACHE>
const Added ADDED[] = {added_avx512<1, CACHE>, added_avx512<2, CACHE>, added_avx512<3, CACHE>, added_avx512<4, CACHE>};

}  // namespace

void four_apart(const Four &four, int64_t count, const uint16_t *x, float *const *found) {
    (moekit_cache_to_ask() == FIRST ? apart_avx512<FIRST> : apart_avx512<SECOND>)(four, count, x, found);
}

void four_added(const Four &four, const uint16_t *const *x, const float *weights, float *found) {
    (moekit_cache_to_ask() == FIRST ? ADDED<FIRST> : ADDED<SECOND>)[four.in / 32 - 1](four, x, weights, found);
}

}  // namespace rows
