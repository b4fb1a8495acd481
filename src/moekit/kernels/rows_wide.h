// Vectors of 16 numbers for AVX512: SwiGLU's gate, and squares turned about their diagonal.
#pragma once

#include "rows.h"

namespace rows {

// e^x to 2 units in the last place: 2^n e^r with |r| <= ln 2 / 2, e^r by its series to r^6 / 6!.
AVX512 inline __m512 exp16(__m512 x) {
    x = _mm512_min_ps(_mm512_set1_ps(89), _mm512_max_ps(_mm512_set1_ps(-104), x));
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 y = _mm512_set1_ps(1.0f / 720);
    for (float factor : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
        y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(factor));
    return _mm512_scalef_ps(y, n);
}

AVX512 inline __m512 silu16(__m512 gate) {
    const __m512 one = _mm512_set1_ps(1);
    return _mm512_div_ps(gate, _mm512_add_ps(one, exp16(_mm512_sub_ps(_mm512_setzero_ps(), gate))));
}

// Row i of the square becomes column i.
AVX512 inline void turn16(__m512i square[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(square[i], square[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(square[i], square[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        square[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        square[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        square[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        square[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(square[i], square[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(square[i], square[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(square[i + 8], square[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(square[i + 8], square[i + 12], 0xdd);
    }
    for (int i = 0; i < 8; i++) {
        square[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        square[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    }
}

}  // namespace rows
