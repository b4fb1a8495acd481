// Rows of x laid out for the tiles.

#include "quantised_tiles.h"
#include "rows.h"
#include "wide.h"

namespace rows {

void Packed::shape(int64_t n_, int64_t in_, int64_t group_) {
    n = n_, in = in_, group = group_, groups = in / group;
    vectors = (n + 15) / 16, half = n % 16 > 0 && n % 16 <= 8;
    numbers.resize(16 * vectors * in);
    scale.resize(16 * vectors * groups);
    sum.resize(16 * vectors * groups);
}

namespace {

AVX512 void pack_numbers(const Rows &from, const int64_t *which, int64_t held, int64_t lanes, int64_t in, int8_t *to) {
    for (int64_t i = 0; i < in; i += 64) {
        __m512i square[16];
        for (int64_t lane = 0; lane < 16; lane++)
            square[lane] = lane < held ? _mm512_load_si512(&from.narrow[which[lane] * from.length + i]) : _mm512_setzero_si512();
        wide::transpose(square);
        const int64_t fours = std::min<int64_t>(in - i, 64) / 4;
        for (int64_t four = 0; four < fours; four++) {
            int8_t *at = to + (i / 4 + four) * 4 * lanes;
            if (lanes == 16) _mm512_storeu_si512(at, square[four]);
            else _mm256_storeu_si256((__m256i *)at, _mm512_castsi512_si256(square[four]));
        }
    }
}

AVX512 void pack_gated_numbers(Packed &x, int64_t vector, int64_t which, float *gate, const float *up, int64_t ld) {
    __m512i most = _mm512_setzero_si512(), total = most;
    for (int64_t j = 0; j < x.group; j++) {
        const __m512 inner = _mm512_mul_ps(wide::silu(_mm512_loadu_ps(gate + j * ld)), _mm512_loadu_ps(up + j * ld));
        _mm512_storeu_ps(gate + j * ld, inner);
        // As whole numbers, magnitudes that are no numbers are the largest.
        most = _mm512_max_epi32(most, _mm512_and_si512(_mm512_castps_si512(inner), _mm512_set1_epi32(0x7fffffff)));
    }
    const __m512 step = _mm512_div_ps(_mm512_castsi512_ps(most), _mm512_set1_ps(127));
    const __mmask16 any = _mm512_cmp_ps_mask(step, _mm512_setzero_ps(), _CMP_GT_OQ);
    const __m512 inverse = _mm512_maskz_div_ps(any, _mm512_set1_ps(1), step);
    const int64_t lanes = x.lanes(vector);
    int8_t *to = &x.numbers[16 * vector * x.in + which * x.group * lanes];
    for (int64_t j = 0; j < x.group; j += 4) {
        __m512i four = _mm512_setzero_si512();
        for (int k = 3; k >= 0; k--) {
            const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(gate + (j + k) * ld), inverse));
            total = _mm512_add_epi32(total, q);
            four = _mm512_or_si512(_mm512_slli_epi32(four, 8), _mm512_and_si512(q, _mm512_set1_epi32(255)));
        }
        if (lanes == 16) _mm512_storeu_si512(to + j * lanes, four);
        else _mm256_storeu_si256((__m256i *)(to + j * lanes), _mm512_castsi512_si256(four));
    }
    const int64_t at = (vector * x.groups + which) * 16;
    _mm512_storeu_ps(&x.scale[at], step);
    _mm512_storeu_ps(&x.sum[at], _mm512_mul_ps(step, _mm512_cvtepi32_ps(total)));
}

}  // namespace

void Packed::pack(int64_t vector, const Rows &from, const int64_t *which) {
    const int64_t rows = held(vector);
    pack_numbers(from, which, rows, lanes(vector), in, &numbers[16 * vector * in]);
    for (int64_t g = 0; g < groups; g++)
        for (int64_t lane = 0; lane < 16; lane++) {
            const int64_t at = (vector * groups + g) * 16 + lane, other = lane < rows ? which[lane] * from.groups + g : -1;
            scale[at] = other < 0 ? 0 : from.scale[other];
            sum[at] = other < 0 ? 0 : from.sum[other];
        }
}

void Packed::pack_gated(int64_t vector, int64_t which, float *gate, const float *up, int64_t ld) {
    pack_gated_numbers(*this, vector, which, gate, up, ld);
}

}  // namespace rows
