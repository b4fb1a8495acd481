// What kernels of plain loops share: numbers in bfloat16 or float32, sums in lanes, an exponential, and the attributes by
// which the same loop is compiled for each instruction set (level 2: AVX512, 1: AVX2, 0: the compiler's own).

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#define INLINE inline __attribute__((always_inline))
#define AT_LEVEL_1 __attribute__((target("avx2,fma")))
#define AT_LEVEL_2 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")))

namespace {

constexpr int LANES = 32;  // sums side by side, which a compiler may not make of one sum
constexpr float LOG2_E = 1.44269504f;

INLINE float widened(float value) { return value; }

INLINE float widened(uint16_t value) {
    const uint32_t bits = uint32_t(value) << 16;
    float found;
    std::memcpy(&found, &bits, 4);
    return found;
}

INLINE void narrow_to(float *to, float value) { *to = value; }

INLINE void narrow_to(uint16_t *to, float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16, not_a_number = (bits >> 16) | 0x40;
    *to = uint16_t((bits & 0x7fffffff) > 0x7f800000 ? not_a_number : rounded);
}

// The sum of term(i) for i < n.
template <typename Term> INLINE float sum_of(int64_t n, Term term) {
    float lanes[LANES] = {};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int lane = 0; lane < LANES; lane++) lanes[lane] += term(i + lane);
    for (; i < n; i++) lanes[0] += term(i);
    double total = 0;
    for (float lane : lanes) total += lane;
    return float(total);
}

// 2^x for x up to 127, to 2e-7 of it; 0 below 2^-126.
INLINE float power_of_2(float x) {
    x = std::max(x, -127.0f);
    const float whole = std::nearbyint(x), rest = x - whole;
    float sum = 1.54035304e-4f;
    sum = sum * rest + 1.33335581e-3f;
    sum = sum * rest + 9.61812911e-3f;
    sum = sum * rest + 5.55041087e-2f;
    sum = sum * rest + 2.40226507e-1f;
    sum = sum * rest + 6.93147181e-1f;
    sum = sum * rest + 1.0f;
    const uint32_t bits = uint32_t(int32_t(whole) + 127) << 23;
    float factor;
    std::memcpy(&factor, &bits, 4);
    return sum * factor;
}

}  // namespace
