// The tiles: numbers of the matrix are broadcast, four at a time, and meet four numbers of each of 16 rows of x.

#include "quantised_tiles.h"

namespace rows {
namespace {

// Numbers of a row after which the next rows' turn comes: those of 48 rows of x stay in the first cache.
constexpr int64_t SLAB = 256;

struct Lanes16 {
    static constexpr int64_t WIDTH = 16;
    using Whole = __m512i;
    using Real = __m512;
    AVX512 static Whole zero() { return _mm512_setzero_si512(); }
    AVX512 static Whole load(const int8_t *p) { return _mm512_loadu_si512(p); }
    AVX512 static Whole four(int32_t w) { return _mm512_set1_epi32(w); }
    AVX512 static Whole dot(Whole sum, Whole w, Whole x) { return _mm512_dpbusd_epi32(sum, w, x); }
    AVX512 static Real real(Whole v) { return _mm512_cvtepi32_ps(v); }
    AVX512 static Real all(float v) { return _mm512_set1_ps(v); }
    AVX512 static Real get(const float *p) { return _mm512_loadu_ps(p); }
    AVX512 static void put(float *p, Real v) { _mm512_storeu_ps(p, v); }
    AVX512 static Real times(Real a, Real b) { return _mm512_mul_ps(a, b); }
    AVX512 static Real fma(Real a, Real b, Real c) { return _mm512_fmadd_ps(a, b, c); }
};

struct Lanes8 {
    static constexpr int64_t WIDTH = 8;
    using Whole = __m256i;
    using Real = __m256;
    AVX512 static Whole zero() { return _mm256_setzero_si256(); }
    AVX512 static Whole load(const int8_t *p) { return _mm256_loadu_si256((const __m256i *)p); }
    AVX512 static Whole four(int32_t w) { return _mm256_set1_epi32(w); }
    AVX512 static Whole dot(Whole sum, Whole w, Whole x) { return _mm256_dpbusd_epi32(sum, w, x); }
    AVX512 static Real real(Whole v) { return _mm256_cvtepi32_ps(v); }
    AVX512 static Real all(float v) { return _mm256_set1_ps(v); }
    AVX512 static Real get(const float *p) { return _mm256_loadu_ps(p); }
    AVX512 static void put(float *p, Real v) { _mm256_storeu_ps(p, v); }
    AVX512 static Real times(Real a, Real b) { return _mm256_mul_ps(a, b); }
    AVX512 static Real fma(Real a, Real b, Real c) { return _mm256_fmadd_ps(a, b, c); }
};

inline int32_t four_at(const uint8_t *p) {
    int32_t found;
    std::memcpy(&found, p, 4);
    return found;
}

// R rows of the strip times V vectors of x, groups [begin, end): added to `out`, or put there where begin is 0.
template <class L, int R, int V>
AVX512 void tile(const Strip &strip, int64_t row, const Packed &x, int64_t vector, int64_t begin, int64_t end, float *out,
                 int64_t ld) {
    const int64_t group = x.group, apart = 16 * x.in, length = strip.length;
    const uint8_t *w = &strip.numbers[row * length];
    const int8_t *numbers = &x.numbers[vector * apart];
    typename L::Real total[R][V];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) total[r][v] = begin ? L::get(out + r * ld + 16 * v) : L::all(0);
    for (int64_t g = begin; g < end; g++) {
        typename L::Whole sums[R][V];
        for (int r = 0; r < R; r++)
            for (int v = 0; v < V; v++) sums[r][v] = L::zero();
        for (int64_t first = g * group; first < (g + 1) * group; first += 16)
#pragma GCC unroll 4
            for (int64_t j = 0; j < 16; j += 4) {
                const int64_t i = first + j;
                typename L::Whole four[V];
                for (int v = 0; v < V; v++) four[v] = L::load(numbers + v * apart + i * L::WIDTH);
                for (int r = 0; r < R; r++) {
                    const typename L::Whole weights = L::four(four_at(w + r * length + i));
                    for (int v = 0; v < V; v++) sums[r][v] = L::dot(sums[r][v], weights, four[v]);
                }
            }
        for (int r = 0; r < R; r++) {
            const typename L::Real scale = L::all(strip.scale[(row + r) * strip.groups + g]);
            const typename L::Real least = L::all(strip.least[(row + r) * strip.groups + g]);
            for (int v = 0; v < V; v++) {
                const int64_t at = ((vector + v) * x.groups + g) * 16;
                const typename L::Real factor = L::times(scale, L::get(&x.scale[at]));
                total[r][v] = L::fma(factor, L::real(sums[r][v]), total[r][v]);
                total[r][v] = L::fma(least, L::get(&x.sum[at]), total[r][v]);
            }
        }
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) L::put(out + r * ld + 16 * v, total[r][v]);
}

using Tile = void (*)(const Strip &, int64_t, const Packed &, int64_t, int64_t, int64_t, float *, int64_t);
struct Shape { Tile tile; int64_t rows, vectors; };

// Four rows by three vectors keep 12 sums and 12 totals in 32 registers; four vectors are two pairs, not three and one.
Shape shape_for(const Packed &x, int64_t vector, int64_t end) {
    const int64_t left = end - vector;
    if (x.lanes(vector) == 8) return {tile<Lanes8, 8, 1>, 8, 1};
    const int64_t whole = left - (x.lanes(end - 1) == 8);
    if (whole == 1) return {tile<Lanes16, 8, 1>, 8, 1};
    return whole == 2 || whole == 4 ? Shape{tile<Lanes16, 4, 2>, 4, 2} : Shape{tile<Lanes16, 4, 3>, 4, 3};
}

// Where the numbers of 64 bytes come from, eight at a time, out of all low halves (0 to 7) and all high ones (8 to 15).
AVX512 inline __m512i order_of(int64_t group, bool second) {
    if (group == 32) return second ? _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15) : _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
    if (group == 64) return second ? _mm512_setr_epi64(4, 5, 6, 7, 12, 13, 14, 15) : _mm512_setr_epi64(0, 1, 2, 3, 8, 9, 10, 11);
    return second ? _mm512_setr_epi64(8, 9, 10, 11, 12, 13, 14, 15) : _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7);
}

AVX512 void unpack_row(const uint8_t *from, int64_t bytes, const Matrix &matrix, uint8_t *to) {
    const __m512i low = _mm512_set1_epi8(15);
    const __m512i first = order_of(matrix.group, false), second = order_of(matrix.group, true);
    for (int64_t i = 0; i < bytes; i += 64) {
        _mm_prefetch((const char *)(from + i + AHEAD), _MM_HINT_T0);
        const __m512i both = _mm512_maskz_loadu_epi8(first_bytes(bytes - i), from + i);
        if (matrix.bits == 8) {
            _mm512_store_si512(to + i, both);
            continue;
        }
        const __m512i lows = _mm512_and_si512(both, low), highs = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
        _mm512_store_si512(to + 2 * i, _mm512_permutex2var_epi64(lows, first, highs));
        _mm512_store_si512(to + 2 * i + 64, _mm512_permutex2var_epi64(lows, second, highs));
    }
}

AVX512 void unpack_meaning(const uint8_t *from, int64_t groups, float *scale, float *least) {
    for (int64_t g = 0; g < groups; g += 16) {
        const __m512i both = _mm512_maskz_loadu_epi32(wide::first(groups - g), from + 4 * g);
        _mm512_store_ps(scale + g, _mm512_cvtph_ps(_mm512_cvtepi32_epi16(both)));
        _mm512_store_ps(least + g, _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(both, 16))));
    }
}

}  // namespace

void Strip::unpack(const Matrix &matrix, int64_t begin, int64_t end) {
    const int64_t held = matrix.in / matrix.group;
    rows = rounded_up(end - begin, 8), groups = rounded_up(held, 16);
    // A line more than a power of two: rows would share their places in the first cache.
    length = rounded_up(matrix.in, 128) + 64;
    numbers.resize(STRIP * length);
    scale.resize(STRIP * groups);
    least.resize(STRIP * groups);
    for (int64_t r = 0; r < end - begin; r++) {
        const uint8_t *row = matrix.rows + (begin + r) * matrix.stride;
        unpack_meaning(row, held, &scale[r * groups], &least[r * groups]);
        unpack_row(row + 4 * held, matrix.in * matrix.bits / 8, matrix, &numbers[r * length]);
    }
    // Rows that fill up the last tile are computed and thrown away.
    for (int64_t r = end - begin; r < rows; r++) {
        std::fill_n(&scale[r * groups], groups, 0.0f);
        std::fill_n(&least[r * groups], groups, 0.0f);
        std::fill_n(&numbers[r * length], length, 0);
    }
}

void Strip::times(const Packed &x, int64_t begin, int64_t end, float *out, int64_t ld, Ahead &ahead) const {
    const int64_t groups = x.in / x.group, slab = SLAB / x.group;
    const int64_t tiles = (end - begin + 2) / 3 * ((groups + slab - 1) / slab) * (rows / 8);
    const int64_t lines = ahead.lines() / tiles + 1;
    for (int64_t v = begin; v < end;) {
        const Shape shape = shape_for(x, v, end);
        for (int64_t g = 0; g < groups; g += slab)
            for (int64_t r = 0; r < rows; r += shape.rows) {
                ahead.ask(lines);
                shape.tile(*this, r, x, v, g, std::min(g + slab, groups), out + r * ld + 16 * (v - begin), ld);
            }
        v += shape.vectors;
    }
}

}  // namespace rows
