// Rows of bfloat16 side by side, for AVX512. Of four short matrices some are always on their way, where memory is slow at
// every beginning of one after the other. Of both halves of a long one each number of x is fetched once for two rows.

#include "side_by_side.h"
#include "wide.h"

namespace rows {
namespace {

constexpr int CHAINS = 4;              // sums of a row that are on their way at once
constexpr int64_t PIECE = 32 * CHAINS;  // numbers of a row that are read before it is the next matrix's turn

template <Cache CACHE>
AVX512 inline __attribute__((always_inline)) __m512 plus_product(__m512 total, const uint8_t *row, const uint8_t *ahead, __m512i x) {
    ask_in<CACHE>(ahead);
    return _mm512_dpbf16_ps(total, (__m512bh)_mm512_loadu_si512(row), (__m512bh)x);
}

// Rows of V vectors; all or none of them are inside. The sums stay in registers: see short_rows.
template <int V, Cache CACHE>
AVX512 void added_avx512(const Beside &beside, const uint16_t *const *x, const float *weights, float *found) {
    const uint8_t *const *ahead = beside.inside > 0 ? beside.ahead : beside.after;
    __m512 sums[TOGETHER];
#pragma GCC unroll 16
    for (int64_t one = 0; one < TOGETHER; one++) {
        const int64_t at = one * beside.stride;
        sums[one] = _mm512_setzero_ps();
        for (int m = 0; m < SIDE; m++) {
            __m512 total = _mm512_setzero_ps();
            for (int v = 0; v < V; v++)
                total = plus_product<CACHE>(total, beside.rows[m] + at + 64 * v, ahead[m] + at + 64 * v, _mm512_loadu_si512(x[m] + 32 * v));
            sums[one] = _mm512_fmadd_ps(_mm512_set1_ps(weights[m]), total, sums[one]);
        }
    }
    wide::store_sums(found, sums, TOGETHER);
}

template <int N, Cache CACHE>
AVX512 void apart_avx512(const Beside &beside, int64_t count, const uint16_t *x, float *const *found) {
    __m512 sums[N][TOGETHER];
    for (int64_t one = 0; one < count; one++) {
        const uint8_t *const *ahead = one < beside.inside ? beside.ahead : beside.after;
        __m512 total[N][CHAINS];
        for (int m = 0; m < N; m++)
            for (int c = 0; c < CHAINS; c++) total[m][c] = _mm512_setzero_ps();
        const auto add = [&](int m, int c, int64_t i, __m512i part) AVX512 {
            const int64_t at = one * beside.stride + 2 * i;
            total[m][c] = plus_product<CACHE>(total[m][c], beside.rows[m] + at, ahead[m] + at, part);
        };
        int64_t i = 0;
        for (; i + PIECE <= beside.in; i += PIECE) {
            __m512i part[CHAINS];
            for (int c = 0; c < CHAINS; c++) part[c] = _mm512_loadu_si512(x + i + 32 * c);
            for (int m = 0; m < N; m++)
                for (int c = 0; c < CHAINS; c++) add(m, c, i + 32 * c, part[c]);
        }
        for (int c = 0; c + 1 < CHAINS && i < beside.in; c++, i += 32)
            for (int m = 0; m < N; m++) add(m, c, i, _mm512_loadu_si512(x + i));
        for (int m = 0; m < N; m++) {
            for (int c = 1; c < CHAINS; c++) total[m][0] = _mm512_add_ps(total[m][0], total[m][c]);
            sums[m][one] = total[m][0];
        }
    }
    for (int m = 0; m < N; m++) wide::store_sums(found[m], sums[m], count);
}

using Added = void (*)(const Beside &, const uint16_t *const *x, const float *weights, float *found);
// By the vectors of a row.
template <Cache CACHE>
const Added ADDED[] = {added_avx512<1, CACHE>, added_avx512<2, CACHE>, added_avx512<3, CACHE>, added_avx512<4, CACHE>};

template <int N> void apart_of(const Beside &beside, int64_t count, const uint16_t *x, float *const *found) {
    (moekit_cache_to_ask() == FIRST ? apart_avx512<N, FIRST> : apart_avx512<N, SECOND>)(beside, count, x, found);
}

}  // namespace

void apart(const Beside &beside, int64_t count, const uint16_t *x, float *const *found) {
    (beside.n == 2 ? apart_of<2> : apart_of<SIDE>)(beside, count, x, found);
}

void added(const Beside &beside, const uint16_t *const *x, const float *weights, float *found) {
    (moekit_cache_to_ask() == FIRST ? ADDED<FIRST> : ADDED<SECOND>)[beside.in / 32 - 1](beside, x, weights, found);
}

}  // namespace rows
