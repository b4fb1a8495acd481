// Tiles of matrix products for AVX512: rows of one matrix times columns of another that were packed into panels.
//
// A panel holds COLUMNS columns, word after word along the inner dimension. A word is 32 bits of a column: one float32, or
// two bfloat16, which one instruction multiplies and adds. Rows of the first factor are read where they lie, each contiguous
// along the inner dimension. So both types run through the same code.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "caches.h"
#include "lines.h"
#include "wide.h"

WIDE_BEGIN

namespace tiles {

using namespace wide;
using Word = uint32_t;
constexpr int VECTORS = 3;               // vectors of a panel
constexpr int COLUMNS = LANES * VECTORS;
constexpr int ROWS = 8;                  // rows of a tile: 24 sums, 3 columns and one factor are 28 of 32 registers
constexpr int STRIP = 2 * ROWS;          // rows that are finished together, as many as a vector has lanes
using Found = float[STRIP * COLUMNS];    // a strip times a panel; it should begin with a line
constexpr int LINE = 64;                 // bytes
constexpr int NEAR = 8192;               // of a strip whose rows are asked for when those before it begin, not a tile ahead

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
    // Two vectors of numbers, in an order that `store_two` undoes.
    static inline void load_two(const Number *from, __m512 (&found)[2]) { found[0] = load(from), found[1] = load(from + LANES); }
    static inline void store_two(Number *to, const __m512 (&values)[2]) { store(to, values[0]), store(to + LANES, values[1]); }
    template <int V> static inline void store(Number *to, const __m512 (&values)[V], bool past_caches) {
#pragma GCC unroll 4
        for (int v = 0; v < V; v++)
            if (past_caches) _mm512_stream_ps(to + v * LANES, values[v]);
            else _mm512_storeu_ps(to + v * LANES, values[v]);
    }
    // The words of 16 columns at rows `from` and, for types of two numbers a word, `after`.
    static inline __m512i words(const Number *from, const Number *) { return _mm512_loadu_si512(from); }
    static inline __m512i words(__m512 value, __m512) { return _mm512_castps_si512(value); }
    static inline void two_words(const Number *from, const Number *, __m512i &first, __m512i &second) {
        first = _mm512_loadu_si512(from), second = _mm512_loadu_si512(from + LANES);
    }
};

// What is found is added to what is there.
struct Added : Float32 {
    template <int V> static inline void store(Number *to, const __m512 (&values)[V], bool) {
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) _mm512_storeu_ps(to + v * LANES, _mm512_add_ps(_mm512_loadu_ps(to + v * LANES), values[v]));
    }
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
    static inline __m512 load(const Number *from) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(wide(_mm256_loadu_si256((const __m256i *)from)), 16));
    }
    static inline void store(Number *to, __m512 value) {
        _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh(value));
    }
    static inline void load_two(const Number *from, __m512 (&found)[2]) {
        const __m512i both = _mm512_loadu_si512(from);
        found[0] = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
        found[1] = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(int(0xffff0000))));
    }
    static inline void store_two(Number *to, const __m512 (&values)[2]) {
        _mm512_storeu_si512(to, _mm512_permutexvar_epi16(pairs(LANES), (__m512i)_mm512_cvtne2ps_pbh(values[1], values[0])));
    }
    template <int V> static inline void store(Number *to, const __m512 (&values)[V], bool past_caches) {
#pragma GCC unroll 2
        for (int v = 0; v + 1 < V; v += 2) {
            const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(values[v + 1], values[v]);
            if (past_caches) _mm512_stream_si512((__m512i *)(to + v * LANES), both);
            else _mm512_storeu_si512(to + v * LANES, both);
        }
        if (V % 2) store(to + (V - 1) * LANES, values[V - 1]);
    }
    // The places i and i + apart, for i < 16.
    static inline __m512i pairs(int apart) {
        const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
        return _mm512_or_si512(lanes, _mm512_slli_epi32(_mm512_add_epi32(lanes, _mm512_set1_epi32(apart)), 16));
    }
    static inline __m512i words(const Number *from, const Number *after) {
        return _mm512_or_si512(wide(from), _mm512_slli_epi32(wide(after), 16));
    }
    static inline __m512i words(__m512 value, __m512 after) {
        return _mm512_permutexvar_epi16(pairs(LANES), (__m512i)_mm512_cvtne2ps_pbh(after, value));
    }
    // The words of 32 columns.
    static inline void two_words(const Number *from, const Number *after, __m512i &first, __m512i &second) {
        const __m512i low = _mm512_loadu_si512(from), high = after ? _mm512_loadu_si512(after) : _mm512_setzero_si512();
        const __m512i order = pairs(2 * LANES);
        first = _mm512_permutex2var_epi16(low, order, high);
        second = _mm512_permutex2var_epi16(low, _mm512_add_epi16(order, _mm512_set1_epi16(16)), high);
    }
};

// A word that may begin anywhere: rows of a mapped file do.
inline int word(const Word *from) {
    int found;
    std::memcpy(&found, from, sizeof found);
    return found;
}

inline void ask(const void *at) { ask_in<FIRST>(at); }

// Lines of memory from anywhere that are asked for while something else is computed, one with every second word of its inner
// dimension; or null.
using Elsewhere = const char *const *;
constexpr int64_t EVERY = 2;

inline int64_t up_to(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

// found[ROWS][COLUMNS] = rows at `a` times the first V vectors of a panel and the first REST columns of one more, whose
// others are zero: half a vector, or a quarter. One sum of these takes two rows. What lies at `next` is asked for meanwhile,
// and what lies elsewhere.
template <class Type, bool ALSO, int V, int REST>
inline void tile(const Word *a, int64_t stride, const Word *panel, int64_t words, float *found, const char *next, Elsewhere also) {
    constexpr int HALF = ROWS / 2;
    __m512 sum[ROWS][V + 1];
    __m512 halves[HALF];
    __m256 quarters[HALF];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
        if (r < HALF) halves[r] = _mm512_setzero_ps(), quarters[r] = _mm256_setzero_ps();
#pragma GCC unroll 3
        for (int v = 0; v < V; v++) sum[r][v] = _mm512_setzero_ps();
    }
    // Two bases let all eight rows be addressed without a register for each.
    const Word *low = a, *high = a + HALF * stride;
    const bool second = moekit_cache_to_ask() == SECOND;
    for (int64_t k = 0; k < words; k++) {
        const Word *column = panel + k * COLUMNS;
        __m512i b[V + 1];
        __m512i half;
        __m256i quarter;
#pragma GCC unroll 3
        for (int v = 0; v < V; v++) b[v] = _mm512_loadu_si512(column + v * LANES);
        if (REST == 8) half = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)(column + V * LANES)));
        if (REST == 4) quarter = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(column + V * LANES)));
        const char *later = next + k * ROWS * sizeof(Word);
        if (second) ask_in<SECOND>(later);
        // Not into the shared cache, where it would take the place of what other experts' rows are read from.
        else _mm_prefetch(later, _MM_HINT_NTA);
        if (ALSO) ask(also[k / EVERY]);
#pragma GCC unroll 4
        for (int r = 0; r < HALF; r++) {
            const __m512i one = _mm512_set1_epi32(word(low + r * stride + k)), other = _mm512_set1_epi32(word(high + r * stride + k));
#pragma GCC unroll 3
            for (int v = 0; v < V; v++) {
                sum[r][v] = Type::multiply_add(sum[r][v], one, b[v]);
                sum[r + HALF][v] = Type::multiply_add(sum[r + HALF][v], other, b[v]);
            }
            if (REST == 8) halves[r] = Type::multiply_add(halves[r], _mm512_mask_blend_epi32(0xff00, one, other), half);
            if (REST == 4) quarters[r] = Type::multiply_add(quarters[r], _mm256_blend_epi32(_mm512_castsi512_si256(one), _mm512_castsi512_si256(other), 0xf0), quarter);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
        float *to = found + r * COLUMNS;
#pragma GCC unroll 3
        for (int v = 0; v < V; v++) _mm512_storeu_ps(to + v * LANES, sum[r][v]);
        if (REST == 8) _mm512_storeu_ps(to + V * LANES, _mm512_zextps256_ps512(r < HALF ? _mm512_castps512_ps256(halves[r]) : _mm512_extractf32x8_ps(halves[r - HALF], 1)));
        if (REST == 4) _mm512_storeu_ps(to + V * LANES, _mm512_zextps128_ps512(r < HALF ? _mm256_castps256_ps128(quarters[r]) : _mm256_extractf128_ps(quarters[r - HALF], 1)));
    }
}

// For each number of quarters of a vector; three are computed as four.
template <class Type> using Tile = decltype(&tile<Type, false, 3, 0>);
template <class Type, bool ALSO> constexpr Tile<Type> TILES[] = {
    tile<Type, ALSO, 0, 4>, tile<Type, ALSO, 0, 8>, tile<Type, ALSO, 1, 0>, tile<Type, ALSO, 1, 0>, tile<Type, ALSO, 1, 4>, tile<Type, ALSO, 1, 8>,
    tile<Type, ALSO, 2, 0>, tile<Type, ALSO, 2, 0>, tile<Type, ALSO, 2, 4>, tile<Type, ALSO, 2, 8>, tile<Type, ALSO, 3, 0>, tile<Type, ALSO, 3, 0>};
template <class Type> const Tile<Type> *tiles_of(Elsewhere also) { return also ? TILES<Type, true> : TILES<Type, false>; }

// found = STRIP rows at `a` times the first `columns` columns of a panel, and zeros up to the next whole vector. The rows
// that are needed next begin at `next`.
template <class Type>
void strip(const typename Type::Number *a, int64_t stride, const Word *panel, int64_t words, int64_t columns, float *found, const typename Type::Number *next, Elsewhere also) {
    const auto fitting = tiles_of<Type>(also)[(std::min<int64_t>(columns, COLUMNS) + LANES / 4 - 1) / (LANES / 4) - 1];
    for (int half = 0; half < STRIP; half += ROWS) {
        const Word *rows = (const Word *)(a + half * stride);
        const int64_t step = stride / Type::PER_WORD;
        const auto *ahead = STRIP * words * sizeof(Word) <= NEAR ? next + half * stride : half ? next : a + ROWS * stride;
        fitting(rows, step, panel, words, found + half * COLUMNS, (const char *)ahead, also && half ? also + words / EVERY : also);
    }
}

inline int64_t panels(int64_t columns) { return (columns + COLUMNS - 1) / COLUMNS; }

// each(panel, begin, n) for all panels of `columns` columns. They are nearly alike, and all but the last whole vectors: a
// panel of few columns takes longer than these are worth.
template <class Each> void in_panels(int64_t columns, Each each) {
    const int64_t count = panels(columns);
    for (int64_t p = 0, begin = 0, end; p < count; p++, begin = end) {
        end = std::min(columns, up_to(((p + 1) * columns + count - 1) / count, LANES));
        each(p, begin, end - begin);
    }
}

// each(V, d) for V vectors of a row from its column d on: blocks of AT_ONCE of them, then the others one by one.
template <int AT_ONCE, class Each> void in_blocks(int64_t width, Each each) {
    int64_t d = 0;
    for (; d + AT_ONCE * LANES <= width; d += AT_ONCE * LANES) each(std::integral_constant<int, AT_ONCE>(), d);
    for (; d < width; d += LANES) each(std::integral_constant<int, 1>(), d);
}

// Rows of numbers: those that `which` names, or one after the other.
template <class Number> struct Rows {
    const Number *at;
    int64_t stride;
    const int64_t *which;
    const Number *row(int64_t i) const { return at + (which ? which[i] : i) * stride; }
};

// A panel whose columns are n rows of `x`, each of `words` words; zero columns after them fill the last vector. Rows come from
// anywhere: those that follow, `known` in all, are asked for meanwhile. Words of the panel lie `APART` from each other.
template <int APART, class Number>
void pack_rows(const Rows<Number> &x, int64_t n, int64_t known, int64_t words, Word *panel) {
    for (int64_t begin = 0; begin < n; begin += LANES) {
        Word *to = panel + begin;
        for (int64_t k = 0; k < words; k += 16) {
            __m512i block[16];
            for (int64_t i = begin + LANES; i < std::min(begin + 2 * LANES, known); i++) ask((const Word *)x.row(i) + k);
            for (int i = 0; i < 16; i++)
                block[i] = begin + i < n ? _mm512_maskz_loadu_epi32(first(words - k), (const Word *)x.row(begin + i) + k) : _mm512_setzero_si512();
            transpose(block);
            for (int i = 0; i < std::min<int64_t>(16, words - k); i++) _mm512_storeu_si512(to + (k + i) * APART, block[i]);
        }
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

// Where a product goes: rows of numbers `stride` apart. What is larger than the caches, and not read soon, may go past them:
// a line is then not read before it is written. Its rows must begin with whole lines, and `_mm_sfence` must follow.
template <class Number> struct Target {
    Number *at;
    int64_t stride;
    bool past_caches;
};

// Rows take what as many strips found as make whole lines, one after the other; or the first `numbers` of these.
template <class Type>
void put_lines(const float *const *found, int64_t n, int64_t numbers, const Target<typename Type::Number> &to) {
    const __mmask16 there = first(numbers / Type::PER_WORD);
    for (int64_t begin = 0; begin < n; begin += LANES) {
        __m512i block[16];
        for (int i = 0; i < 16; i++) {
            const int row = i * Type::PER_WORD;
            const float *own = found[row / STRIP] + row % STRIP * COLUMNS + begin;
            block[i] = Type::words(_mm512_loadu_ps(own), _mm512_loadu_ps(own + (Type::PER_WORD - 1) * COLUMNS));
        }
        transpose(block);
        for (int i = 0; i < std::min<int64_t>(LANES, n - begin); i++) {
            auto *row = to.at + (begin + i) * to.stride;
            if (to.past_caches) _mm512_stream_si512((__m512i *)row, block[i]);
            else if (there == 0xffff) _mm512_storeu_si512(row, block[i]);
            else _mm512_mask_storeu_epi32(row, there, block[i]);  // which takes several times as long
        }
    }
}

}  // namespace tiles

WIDE_END
