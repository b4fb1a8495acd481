// Tiles of matrix products for AVX512: rows of one matrix times columns of another that were packed into panels.
//
// A panel holds COLUMNS columns, word after word along the inner dimension. A word is 32 bits of a column: one float32, or
// two bfloat16, which one instruction multiplies and adds. Rows of the first factor are read where they lie, each contiguous
// along the inner dimension. So both types run through the same code.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma")
#endif

namespace tiles {

using Word = uint32_t;
constexpr int LANES = 16;                // columns of a vector
constexpr int VECTORS = 3;               // vectors of a panel
constexpr int COLUMNS = LANES * VECTORS;
constexpr int ROWS = 8;                  // rows of a tile: 24 sums, 3 columns and one factor are 28 of 32 registers
constexpr int STRIP = 2 * ROWS;          // rows that are finished together, as many as a vector has lanes
using Found = float[STRIP * COLUMNS];    // a strip times a panel

struct Float32 {
    using Number = float;
    static constexpr int PER_WORD = 1;
    static inline __m512 multiply_add(__m512 sum, __m512i a, __m512i b) {
        return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
    }
    static inline __m256 multiply_add(__m256 sum, __m256i a, __m256i b) {
        return _mm256_fmadd_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b), sum);
    }
    static inline __m512 load(const Number *from) { return _mm512_loadu_ps(from); }
    static inline void store(Number *to, __m512 value) { _mm512_storeu_ps(to, value); }
    // The words of 16 columns at rows `from` and, for types of two numbers a word, `after`.
    static inline __m512i words(const Number *from, const Number *) { return _mm512_loadu_si512(from); }
    static inline __m512i words(__m512 value, __m512) { return _mm512_castps_si512(value); }
};

struct BFloat16 {
    using Number = uint16_t;
    static constexpr int PER_WORD = 2;
    static inline __m512 multiply_add(__m512 sum, __m512i a, __m512i b) {
        return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
    }
    static inline __m256 multiply_add(__m256 sum, __m256i a, __m256i b) {
        return _mm256_dpbf16_ps(sum, (__m256bh)a, (__m256bh)b);
    }
    static inline __m512i wide(__m256i value) { return _mm512_cvtepu16_epi32(value); }
    static inline __m512i wide(const Number *from) {
        return from ? wide(_mm256_loadu_si256((const __m256i *)from)) : _mm512_setzero_si512();
    }
    static inline __m512 load(const Number *from) { return _mm512_castsi512_ps(_mm512_slli_epi32(wide(from), 16)); }
    static inline void store(Number *to, __m512 value) {
        _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh(value));
    }
    static inline __m512i words(const Number *from, const Number *after) {
        return _mm512_or_si512(wide(from), _mm512_slli_epi32(wide(after), 16));
    }
    static inline __m512i words(__m512 value, __m512 after) {
        const __m512i low = wide((__m256i)_mm512_cvtneps_pbh(value)), high = wide((__m256i)_mm512_cvtneps_pbh(after));
        return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
    }
};

// A word that may begin anywhere: rows of a mapped file do.
inline int word(const Word *from) {
    int found;
    std::memcpy(&found, from, sizeof found);
    return found;
}

inline int64_t up_to(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

// found[ROWS][COLUMNS] = rows at `a` times the first V vectors of a panel and, with HALF, the first half of one more (the
// other half is zero). What lies at `next` is asked for meanwhile.
template <class Type, int V, bool HALF>
inline void tile(const Word *a, int64_t stride, const Word *panel, int64_t words, float *found, const char *next) {
    __m512 sum[ROWS][V + 1];
    __m256 half[ROWS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
        half[r] = _mm256_setzero_ps();
#pragma GCC unroll 3
        for (int v = 0; v < V; v++) sum[r][v] = _mm512_setzero_ps();
    }
    // Two bases let all eight rows be addressed without a register for each.
    const Word *low = a, *high = a + 4 * stride;
    for (int64_t k = 0; k < words; k++) {
        const Word *column = panel + k * COLUMNS;
        __m512i b[V + 1];
        __m256i c;
#pragma GCC unroll 3
        for (int v = 0; v < V; v++) b[v] = _mm512_loadu_si512(column + v * LANES);
        if (HALF) c = _mm256_loadu_si256((const __m256i *)(column + V * LANES));
        _mm_prefetch(next + k * ROWS * sizeof(Word), _MM_HINT_T1);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            const Word *row = r < 4 ? low + r * stride : high + (r - 4) * stride;
            const __m512i factor = _mm512_set1_epi32(word(row + k));
#pragma GCC unroll 3
            for (int v = 0; v < V; v++) sum[r][v] = Type::multiply_add(sum[r][v], factor, b[v]);
            if (HALF) half[r] = Type::multiply_add(half[r], _mm512_castsi512_si256(factor), c);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
        float *to = found + r * COLUMNS;
#pragma GCC unroll 3
        for (int v = 0; v < V; v++) _mm512_storeu_ps(to + v * LANES, sum[r][v]);
        if (HALF) _mm512_storeu_ps(to + V * LANES, _mm512_insertf32x8(_mm512_setzero_ps(), half[r], 0));
    }
}

// found = STRIP rows at `a` times the first `columns` columns of a panel, and zeros up to the next whole vector.
template <class Type>
void strip(const typename Type::Number *a, int64_t stride, const Word *panel, int64_t words, int64_t columns, float *found) {
    constexpr decltype(&tile<Type, 3, false>) TILES[] = {
        tile<Type, 0, true>, tile<Type, 1, false>, tile<Type, 1, true>, tile<Type, 2, false>, tile<Type, 2, true>, tile<Type, 3, false>};
    const auto fitting = TILES[std::min<int64_t>((columns + LANES / 2 - 1) / (LANES / 2), 6) - 1];
    for (int half = 0; half < STRIP; half += ROWS) {
        const Word *rows = (const Word *)(a + half * stride);
        const int64_t step = stride / Type::PER_WORD;
        fitting(rows, step, panel, words, found + half * COLUMNS, (const char *)(rows + ROWS * step));
    }
}

inline void transpose(__m512i (&r)[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

inline __mmask16 first(int64_t count) { return count >= 16 ? 0xffff : __mmask16((1u << count) - 1); }

// Panels whose columns are the rows of `x` that `which` names, `n` of them, each of `words` words; zero columns after them
// fill the last vector.
template <class Number>
void pack_rows(const Number *x, int64_t stride, const int64_t *which, int64_t n, int64_t words, Word *panels) {
    for (int64_t begin = 0; begin < n; begin += LANES) {
        Word *to = panels + begin / COLUMNS * words * COLUMNS + begin % COLUMNS;
        for (int64_t k = 0; k < words; k += 16) {
            __m512i block[16];
            for (int i = 0; i < 16; i++)
                block[i] = begin + i < n ? _mm512_maskz_loadu_epi32(first(words - k), (const Word *)(x + which[begin + i] * stride) + k)
                                         : _mm512_setzero_si512();
            transpose(block);
            for (int i = 0; i < std::min<int64_t>(16, words - k); i++) _mm512_storeu_si512(to + (k + i) * COLUMNS, block[i]);
        }
    }
}

// Panels of `width` columns beginning at column `from` of the rows of `x` that `which` names: these run along the inner
// dimension, `n` of them.
template <class Type>
void pack_columns(const typename Type::Number *x, int64_t stride, const int64_t *which, int64_t n, int64_t from, int64_t width, Word *panels) {
    const int64_t words = up_to(n, Type::PER_WORD) / Type::PER_WORD;
    for (int64_t k = 0; k < words; k++) {
        const int64_t row = k * Type::PER_WORD;
        const auto *a = x + which[row] * stride + from;
        const auto *b = Type::PER_WORD == 2 && row + 1 < n ? x + which[row + 1] * stride + from : nullptr;
        for (int64_t c = 0; c < width; c += LANES)
            _mm512_storeu_si512(panels + c / COLUMNS * words * COLUMNS + k * COLUMNS + c % COLUMNS, Type::words(a + c, b ? b + c : nullptr));
    }
}

// to[STRIP][..] = STRIP columns, from `x` on, of n rows: they become rows that are contiguous along the inner dimension,
// `room` numbers apart, filled up to a whole word with zeros.
template <class Type>
void turn_columns(const typename Type::Number *x, int64_t stride, int64_t n, typename Type::Number *to, int64_t room) {
    for (int64_t k = 0; k < n; k += 16 * Type::PER_WORD) {
        __m512i block[16];
        for (int i = 0; i < 16; i++) {
            const int64_t row = k + i * Type::PER_WORD, after = row + Type::PER_WORD - 1;
            block[i] = row < n ? Type::words(x + row * stride, after < n ? x + after * stride : nullptr) : _mm512_setzero_si512();
        }
        transpose(block);
        for (int i = 0; i < 16; i++)
            _mm512_mask_storeu_epi32((Word *)(to + i * room + k), first((room - k) / Type::PER_WORD), block[i]);
    }
}

// Rows of `to`, from its column `at` on, take what a strip found for each of `n` columns.
template <class Type>
void put_columns(const float *found, int64_t n, typename Type::Number *to, int64_t stride) {
    for (int64_t begin = 0; begin < n; begin += LANES) {
        __m512i block[16];
        for (int i = 0; i < 16; i++) block[i] = _mm512_loadu_si512(found + i * COLUMNS + begin);
        transpose(block);
        for (int i = 0; i < std::min<int64_t>(LANES, n - begin); i++)
            Type::store(to + (begin + i) * stride, _mm512_castsi512_ps(block[i]));
    }
}

// e^x to about one unit in the last place; NaN stays NaN.
inline __m512 exponential(__m512 x) {
    x = _mm512_min_ps(_mm512_set1_ps(88.0f), _mm512_max_ps(_mm512_set1_ps(-87.0f), x));
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.9875691500e-4f);
    for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
    return _mm512_scalef_ps(_mm512_add_ps(_mm512_fmadd_ps(p, _mm512_mul_ps(r, r), r), _mm512_set1_ps(1)), n);
}

inline __m512 sigmoid(__m512 x) {
    // An estimate of 1 / d and one step of Newton's take a quarter of a division's time.
    const __m512 d = _mm512_add_ps(_mm512_set1_ps(1), exponential(_mm512_sub_ps(_mm512_setzero_ps(), x)));
    const __m512 estimate = _mm512_rcp14_ps(d);
    return _mm512_mul_ps(estimate, _mm512_fnmadd_ps(estimate, d, _mm512_set1_ps(2)));
}

}  // namespace tiles

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
