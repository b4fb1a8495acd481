// Products of bfloat16 rows of a matrix, one after the other, with a few rows of x.

#include "rows.h"
#include "wide.h"

namespace rows {
namespace {

template <int N>
void dot_plain(const Matrix &m, const uint8_t *row, const uint8_t *ahead, const Rows &x, int64_t first,
               float *found, int64_t apart) {
    for (int r = 0; r < N; r++) {
        float total = 0;
        for (int64_t i = 0; i < m.in; i++) {
            uint16_t w;
            std::memcpy(&w, row + 2 * i, 2);
            total += from_bf16(w) * from_bf16(x.wide[(first + r) * m.in + i]);
        }
        found[r * apart] = total;
    }
}

AVX2 inline float sum8(__m256 v) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

AVX2 inline __m256 widen8(const void *p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16));
}

// in must be a multiple of 16.
template <int N>
AVX2 void dot_avx2(const Matrix &m, const uint8_t *row, const uint8_t *ahead, const Rows &x, int64_t first,
               float *found, int64_t apart) {
    __m256 total[N][2];
    for (int r = 0; r < N; r++) total[r][0] = total[r][1] = _mm256_setzero_ps();
    const uint16_t *base = &x.wide[first * m.in];
    for (int64_t i = 0; i < m.in; i += 16) {
        ask_in<FIRST>(ahead + 2 * i);
        __m256 low = widen8(row + 2 * i), high = widen8(row + 2 * i + 16);
        for (int r = 0; r < N; r++) {
            total[r][0] = _mm256_fmadd_ps(low, widen8(base + r * m.in + i), total[r][0]);
            total[r][1] = _mm256_fmadd_ps(high, widen8(base + r * m.in + i + 8), total[r][1]);
        }
    }
    for (int r = 0; r < N; r++) found[r * apart] = sum8(_mm256_add_ps(total[r][0], total[r][1]));
}

// in must be a multiple of 32.
template <int N, Cache CACHE>
AVX512 void dot_avx512(const Matrix &m, const uint8_t *row, int64_t count, const uint8_t *ahead, const Rows &x, int64_t first,
                       float *found, int64_t apart) {
    // With one row of x, several sums hide the latency of the products.
    constexpr int CHAINS = N == 1 ? 4 : N == 2 ? 2 : 1;
    const uint16_t *base = &x.wide[first * m.in];
    __m512 sums[N][TOGETHER];
    for (int64_t one = 0; one < count; one++, row += m.stride, ahead += m.stride) {
        __m512 total[N][CHAINS];
        for (int r = 0; r < N; r++)
            for (int c = 0; c < CHAINS; c++) total[r][c] = _mm512_setzero_ps();
        int64_t i = 0;
        for (; i + 32 * CHAINS <= m.in; i += 32 * CHAINS)
            for (int c = 0; c < CHAINS; c++) {
                const int64_t at = i + 32 * c;
                ask_in<CACHE>(ahead + 2 * at);
                __m512bh w = (__m512bh)_mm512_loadu_si512(row + 2 * at);
                for (int r = 0; r < N; r++)
                    total[r][c] = _mm512_dpbf16_ps(total[r][c], w, (__m512bh)_mm512_loadu_si512(base + r * m.in + at));
            }
        for (int c = 0; c + 1 < CHAINS && i < m.in; c++, i += 32) {
            ask_in<CACHE>(ahead + 2 * i);
            __m512bh w = (__m512bh)_mm512_loadu_si512(row + 2 * i);
            for (int r = 0; r < N; r++)
                total[r][c] = _mm512_dpbf16_ps(total[r][c], w, (__m512bh)_mm512_loadu_si512(base + r * m.in + i));
        }
        for (int r = 0; r < N; r++) {
            for (int c = 1; c < CHAINS; c++) total[r][0] = _mm512_add_ps(total[r][0], total[r][c]);
            sums[r][one] = total[r][0];
        }
    }
    for (int r = 0; r < N; r++) wide::store_sums(found + r * apart, sums[r], count);
}

// One row of x, V vectors in registers, with `count` rows of the matrix, which are as short. Where the sums of a known count
// need few vectors besides, they stay in registers too: a core's last stores may still wait for another's cache.
template <int V, Cache CACHE>
AVX512 inline __attribute__((always_inline)) void short_rows(const uint8_t *row, int64_t stride, int64_t count, const uint8_t *ahead,
                                                             const __m512bh (&x)[V], float *found) {
    __m512 sums[TOGETHER];
    const auto product = [&](int64_t one) AVX512 {
        __m512 total = _mm512_setzero_ps();
        for (int v = 0; v < V; v++) {
            ask_in<CACHE>(ahead + one * stride + 64 * v);
            total = _mm512_dpbf16_ps(total, (__m512bh)_mm512_loadu_si512(row + one * stride + 64 * v), x[v]);
        }
        return total;
    };
    if constexpr (V <= 2) {
#pragma GCC unroll 16
        for (int64_t one = 0; one < count; one++) sums[one] = product(one);
    } else {
#pragma GCC unroll 1
        for (int64_t one = 0; one < count; one++) sums[one] = product(one);
    }
    wide::store_sums(found, sums, count);
}

template <int V, Cache CACHE>
AVX512 void short_avx512(const Matrix &m, const uint8_t *row, int64_t count, const uint8_t *ahead, const Rows &x, int64_t first,
                         float *found, int64_t) {
    __m512bh part[V];
    for (int v = 0; v < V; v++) part[v] = (__m512bh)_mm512_loadu_si512(&x.wide[first * m.in + 32 * v]);
    if (count == TOGETHER) short_rows<V, CACHE>(row, m.stride, TOGETHER, ahead, part, found);
    else short_rows<V, CACHE>(row, m.stride, count, ahead, part, found);
}

#define EACH(name) {each<name<1>>, each<name<2>>, each<name<3>>, each<name<4>>, each<name<5>>, each<name<6>>, each<name<7>>, each<name<8>>}
const Dot PLAIN[] = EACH(dot_plain), HALF[] = EACH(dot_avx2);
template <Cache CACHE, Dot ONE>
const Dot WITH[MOST] = {ONE, dot_avx512<2, CACHE>, dot_avx512<3, CACHE>, dot_avx512<4, CACHE>, dot_avx512<5, CACHE>,
                        dot_avx512<6, CACHE>, dot_avx512<7, CACHE>, dot_avx512<8, CACHE>};
// By the vectors of a row; 0: of a long one.
template <Cache CACHE>
const Dot *const WHOLE[SHORT / 32 + 1] = {
    WITH<CACHE, dot_avx512<1, CACHE>>, WITH<CACHE, short_avx512<1, CACHE>>, WITH<CACHE, short_avx512<2, CACHE>>,
    WITH<CACHE, short_avx512<3, CACHE>>, WITH<CACHE, short_avx512<4, CACHE>>, WITH<CACHE, short_avx512<5, CACHE>>,
    WITH<CACHE, short_avx512<6, CACHE>>, WITH<CACHE, short_avx512<7, CACHE>>, WITH<CACHE, short_avx512<8, CACHE>>};

}  // namespace

const Dot *bfloat16_dots(const Matrix &matrix, int level) {
    if (in_vectors(matrix, level)) {
        const int64_t vectors = matrix.in <= SHORT ? matrix.in / 32 : 0;
        return moekit_cache_to_ask() == FIRST ? WHOLE<FIRST>[vectors] : WHOLE<SECOND>[vectors];
    }
    return level >= 1 && matrix.in % 16 == 0 ? HALF : PLAIN;
}

}  // namespace rows
