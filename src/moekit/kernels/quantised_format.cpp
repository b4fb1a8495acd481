// Rounding matrices to groups of 8- or 4-bit numbers, as `quantise` in groups.py says, to the last bit.

#include "quantised.h"

namespace rows {
namespace {

constexpr int64_t LARGEST_GROUP = 128;

AVX2 inline __m256 widen8(const uint16_t *p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16));
}

AVX2 inline float across(__m256 v, bool least) {
    alignas(32) float lanes[8];
    _mm256_store_ps(lanes, v);
    for (int i = 1; i < 8; i++) lanes[0] = least ? std::min(lanes[0], lanes[i]) : std::max(lanes[0], lanes[i]);
    return lanes[0];
}

// What a group's numbers mean; a number that is none makes the meaning none, too.
struct Meaning { uint16_t scale, least; };

AVX2 inline Meaning meaning_of(const float *w, int64_t group, float most) {
    __m256 least = _mm256_loadu_ps(w), greatest = least, sum = _mm256_setzero_ps();
    for (int64_t i = 0; i < group; i += 8) {
        const __m256 v = _mm256_loadu_ps(w + i);
        least = _mm256_min_ps(least, v), greatest = _mm256_max_ps(greatest, v);
        sum = _mm256_or_ps(sum, _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    }
    if (_mm256_movemask_ps(sum)) return {0x7e00, 0x7e00};
    const uint16_t least16 = _cvtss_sh(across(least, true), 0);
    const float span = across(greatest, false) - _cvtsh_ss(least16);
    return {uint16_t(_cvtss_sh((span < 0 ? 0 : span) / most, 0)), least16};
}

// The numbers of a group, a byte each.
AVX2 inline void numbers_of(const float *w, int64_t group, Meaning meaning, float most, uint8_t *numbers) {
    const float step = _cvtsh_ss(meaning.scale);
    const __m256 least = _mm256_set1_ps(_cvtsh_ss(meaning.least)), steps = _mm256_set1_ps(step == 0 ? 1 : step);
    const __m256 top = _mm256_set1_ps(most), bottom = _mm256_setzero_ps();
    for (int64_t i = 0; i < group; i += 8) {
        const __m256 exact = _mm256_div_ps(_mm256_sub_ps(_mm256_loadu_ps(w + i), least), steps);
        const __m256i q = _mm256_cvtps_epi32(_mm256_min_ps(_mm256_max_ps(exact, bottom), top));
        const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1));
        _mm_storel_epi64((__m128i *)(numbers + i), _mm_packus_epi16(words, words));
    }
}

AVX2 void quantise_row(const void *weight, bool wide, int64_t in, int bits, int64_t group, uint8_t *row) {
    const int64_t groups = in / group, bytes = group * bits / 8;
    const float most = float((1 << bits) - 1);
    alignas(32) float w[LARGEST_GROUP];
    alignas(32) uint8_t numbers[LARGEST_GROUP];
    for (int64_t g = 0; g < groups; g++) {
        if (wide) std::memcpy(w, (const float *)weight + g * group, 4 * group);
        else for (int64_t i = 0; i < group; i += 8) _mm256_store_ps(w + i, widen8((const uint16_t *)weight + g * group + i));
        const Meaning meaning = meaning_of(w, group, most);
        numbers_of(w, group, meaning, most, numbers);
        std::memcpy(row + 4 * g, &meaning, 4);
        uint8_t *to = row + 4 * groups + g * bytes;
        for (int64_t i = 0; i < bytes; i++) to[i] = bits == 8 ? numbers[i] : uint8_t(numbers[i] | numbers[i + bytes] << 4);
    }
}

}  // namespace
}  // namespace rows

// `n` rows of `in` numbers, float32 (wide) or bfloat16, to rows of groups behind each other; for levels from 1 on.
extern "C" void moekit_quantise(const void *weight, int wide, int64_t n, int64_t in, int bits, int64_t group, uint8_t *to,
                                int threads, int) {
    const int64_t bytes = in * bits / 8 + in / group * 4;
#pragma omp parallel for num_threads(threads)
    for (int64_t r = 0; r < n; r++)
        rows::quantise_row((const uint8_t *)weight + r * in * (wide ? 4 : 2), wide, in, bits, group, to + r * bytes);
}
