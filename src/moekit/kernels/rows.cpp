// Rows of activations: rounded to bfloat16 or to 8 bits in groups, and SwiGLU's gate.

#include "rows.h"
#include "wide.h"

namespace rows {

void Rows::shape(int64_t n_, int64_t in_, int32_t bits_, int32_t group_) {
    n = n_, in = in_, bits = bits_, group = bits == 16 ? 0 : group_;
    if (!group) {
        length = in;
        wide.resize(n * in);
        return;
    }
    length = rounded_up(in, 128), groups = rounded_up(in / group, 16);
    narrow.resize(n * length), scale.resize(n * groups), sum.resize(n * groups);
    // What `put` does not reach lies in the last of each.
    for (int64_t row = 1; row <= n && in; row++) {
        std::fill_n(&narrow[row * length - 128], 128, 0);
        std::fill_n(&scale[row * groups - 16], 16, 0.0f);
        std::fill_n(&sum[row * groups - 16], 16, 0.0f);
    }
}

namespace {

// The largest magnitude among `n` numbers; not a number if one of them is none: as whole numbers, those are the largest.
float largest_of(const float *x, int64_t n) {
    __m128i most = _mm_setzero_si128();
    for (int64_t i = 0; i < n; i += 4) {
        const __m128i magnitude = _mm_and_si128(_mm_loadu_si128((const __m128i *)(x + i)), _mm_set1_epi32(0x7fffffff));
        const __m128i greater = _mm_cmpgt_epi32(magnitude, most);
        most = _mm_or_si128(_mm_and_si128(greater, magnitude), _mm_andnot_si128(greater, most));
    }
    int32_t lanes[4];
    std::memcpy(lanes, &most, 16);
    const int32_t found = std::max(std::max(lanes[0], lanes[1]), std::max(lanes[2], lanes[3]));
    float largest;
    std::memcpy(&largest, &found, 4);
    return largest;
}

// 16 numbers x / step, rounded to the nearest (even) number; adds them to `total`.
__m128i sixteen(const float *x, __m128 inverse, __m128i &total) {
    __m128i q[4];
    for (int i = 0; i < 4; i++) {
        q[i] = _mm_cvtps_epi32(_mm_mul_ps(_mm_loadu_ps(x + 4 * i), inverse));
        total = _mm_add_epi32(total, q[i]);
    }
    return _mm_packs_epi16(_mm_packs_epi32(q[0], q[1]), _mm_packs_epi32(q[2], q[3]));
}

}  // namespace

void Rows::put(int64_t row, const float *x, int64_t begin, int64_t end) {
    if (!group) {
        for (int64_t i = begin; i < end; i++) wide[row * length + i] = to_bf16(x[i]);
        return;
    }
    for (int64_t g = begin / group; g < end / group; g++) {
        const float step = largest_of(x + g * group, group) / 127;
        const __m128 inverse = _mm_set1_ps(step > 0 ? 1 / step : 0);
        __m128i total = _mm_setzero_si128();
        for (int64_t j = 0; j < group; j += 16) {
            int64_t at = g * group + j;
            if (bits == 4) {
                const int64_t byte = g * group / 2 + j % (group / 2);
                at = byte / 64 * 128 + byte % 64 + (j < group / 2 ? 0 : 64);
            }
            _mm_storeu_si128((__m128i *)&narrow[row * length + at], sixteen(x + g * group + j, inverse, total));
        }
        int32_t lanes[4];
        std::memcpy(lanes, &total, 16);
        scale[row * groups + g] = step;
        sum[row * groups + g] = step * float(lanes[0] + lanes[1] + lanes[2] + lanes[3]);
    }
}

AVX512 static void gated_avx512(const float *gate, const float *up, float *inner, int64_t n) {
    for (int64_t i = 0; i < n; i += 16) {
        const __mmask16 mask = wide::first(n - i);
        const __m512 open = wide::silu(_mm512_maskz_loadu_ps(mask, gate + i));
        _mm512_mask_storeu_ps(inner + i, mask, _mm512_mul_ps(open, _mm512_maskz_loadu_ps(mask, up + i)));
    }
}

void gated(const float *gate, const float *up, float *inner, int64_t n, int level) {
    if (level >= 2) return gated_avx512(gate, up, inner, n);
    for (int64_t i = 0; i < n; i++) inner[i] = silu(gate[i]) * up[i];
}

}  // namespace rows
