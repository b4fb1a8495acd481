// Vectors of 16 numbers for AVX512, in functions that are made part of any that has its instructions.
#pragma once

#include <cstdint>
#include <immintrin.h>

// Between these, functions are for AVX512 with bfloat16.
#if defined(__clang__)
#define WIDE_BEGIN _Pragma("clang attribute push(__attribute__((target(\"avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma\"))), apply_to = function)")
#define WIDE_END _Pragma("clang attribute pop")
#else
#define WIDE_BEGIN _Pragma("GCC push_options") _Pragma("GCC target(\"avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma\")")
#define WIDE_END _Pragma("GCC pop_options")
#endif

#define WIDE_INLINE inline __attribute__((always_inline))

WIDE_BEGIN

namespace wide {

constexpr int LANES = 16;  // numbers of a vector

// Row i of the square becomes column i.
WIDE_INLINE void transpose(__m512i (&r)[16]) {
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

// The first `count` lanes.
WIDE_INLINE __mmask16 first(int64_t count) { return count >= 16 ? 0xffff : count <= 0 ? 0 : __mmask16((1u << count) - 1); }

// The sums of the lanes of the first `count` of 16 vectors, one behind the other. Each sum is taken in the same order.
WIDE_INLINE void store_sums(float *to, __m512 *vectors, int64_t count) {
    for (int64_t i = count; i < 16; i++) vectors[i] = _mm512_setzero_ps();
    __m512 t[16];
    for (int i = 0; i < 16; i += 2)
        t[i] = _mm512_add_ps(_mm512_unpacklo_ps(vectors[i], vectors[i + 1]), _mm512_unpackhi_ps(vectors[i], vectors[i + 1]));
    for (int i = 0; i < 16; i += 4) {
        const __m512d even = _mm512_castps_pd(t[i]), odd = _mm512_castps_pd(t[i + 2]);
        t[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(even, odd)), _mm512_castpd_ps(_mm512_unpackhi_pd(even, odd)));
    }
    for (int i = 0; i < 16; i += 8) {
        const __m512 left = _mm512_shuffle_f32x4(t[i], t[i + 4], 0x88), right = _mm512_shuffle_f32x4(t[i], t[i + 4], 0xdd);
        t[i] = _mm512_add_ps(left, right);
    }
    const __m512 left = _mm512_shuffle_f32x4(t[0], t[8], 0x88), right = _mm512_shuffle_f32x4(t[0], t[8], 0xdd);
    _mm512_mask_storeu_ps(to, first(count), _mm512_add_ps(left, right));
}

// e^x to about one unit in the last place; NaN stays NaN.
WIDE_INLINE __m512 exponential(__m512 x) {
    x = _mm512_min_ps(_mm512_set1_ps(88.0f), _mm512_max_ps(_mm512_set1_ps(-87.0f), x));
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.9875691500e-4f);
    for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
    return _mm512_scalef_ps(_mm512_add_ps(_mm512_fmadd_ps(p, _mm512_mul_ps(r, r), r), _mm512_set1_ps(1)), n);
}

WIDE_INLINE __m512 sigmoid(__m512 x) {
    // An estimate of 1 / d and one step of Newton's take a quarter of a division's time.
    const __m512 d = _mm512_add_ps(_mm512_set1_ps(1), exponential(_mm512_sub_ps(_mm512_setzero_ps(), x)));
    const __m512 estimate = _mm512_rcp14_ps(d);
    return _mm512_mul_ps(estimate, _mm512_fnmadd_ps(estimate, d, _mm512_set1_ps(2)));
}

WIDE_INLINE __m512 silu(__m512 x) { return _mm512_mul_ps(x, sigmoid(x)); }

}  // namespace wide

WIDE_END
