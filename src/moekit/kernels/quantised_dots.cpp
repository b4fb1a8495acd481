// Products of rows of 8- or 4-bit groups with a few rows of x, each row read once from its first byte to its last:
// leaving that order halves the speed of memory.
//
// A row is, for each group, its scale and its least value in float16, then all its numbers (see groups.py). With 4 bits,
// 64 bytes hold 128 numbers, whatever the group: the low halves meet the first 64 numbers of a block of `Rows`, the high
// halves the other 64.

#include "quantised.h"

namespace rows {
namespace {

struct Meaning { float scale, least; };

Meaning meaning_of(const uint8_t *row, int64_t group) {
    uint16_t both[2];
    std::memcpy(both, row + 4 * group, 4);
    return {from_half(both[0]), from_half(both[1])};
}

template <int N>
void dot_plain(const Matrix &m, const uint8_t *row, const uint8_t *ahead, const Rows &x, int64_t first,
               float *found, int64_t apart) {
    const int64_t groups = m.in / m.group, bytes = int64_t(m.group) * m.bits / 8;
    const uint8_t *numbers = row + 4 * groups;
    for (int r = 0; r < N; r++) {
        const int8_t *q = &x.narrow[(first + r) * x.length];
        found[r * apart] = 0;
        for (int64_t g = 0; g < groups; g++) {
            int32_t product = 0;
            for (int64_t i = g * bytes; i < (g + 1) * bytes; i++) {
                const int64_t low = i / 64 * 128 + i % 64;
                product += m.bits == 8 ? numbers[i] * q[i] : (numbers[i] & 15) * q[low] + (numbers[i] >> 4) * q[low + 64];
            }
            const Meaning meaning = meaning_of(row, g);
            const int64_t at = (first + r) * x.groups + g;
            found[r * apart] += meaning.scale * x.scale[at] * float(product) + meaning.least * x.sum[at];
        }
    }
}

// ---- AVX2: 32 bytes at a time ----

// 32-bit sums of products; maddubs would saturate with numbers up to 255, so those are widened to 16 bits.
template <int BITS> AVX2 inline __m256i products(__m256i sums, __m256i bytes, const int8_t *q) {
    if (BITS == 4) {
        const __m256i low = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
        for (int half = 0; half < 2; half++) {
            const __m256i w = _mm256_and_si256(half ? _mm256_srli_epi16(bytes, 4) : bytes, low);
            const __m256i a = _mm256_loadu_si256((const __m256i *)(q + 64 * half));
            sums = _mm256_add_epi32(sums, _mm256_madd_epi16(_mm256_maddubs_epi16(w, a), ones));
        }
        return sums;
    }
    // Even and odd bytes keep their quarter, and so their group.
    const __m256i a = _mm256_loadu_si256((const __m256i *)q), bottom = _mm256_set1_epi16(255);
    const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(a, 8), 8);
    sums = _mm256_add_epi32(sums, _mm256_madd_epi16(_mm256_and_si256(bytes, bottom), even));
    return _mm256_add_epi32(sums, _mm256_madd_epi16(_mm256_srli_epi16(bytes, 8), _mm256_srai_epi16(a, 8)));
}

AVX2 inline float sum8(__m256 v) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

template <int BITS, int N>
AVX2 void dot_avx2(const Matrix &m, const uint8_t *row, const uint8_t *ahead, const Rows &x, int64_t first,
               float *found, int64_t apart) {
    const int64_t groups = m.in / m.group, bytes = m.in * BITS / 8, one = int64_t(m.group) * BITS / 8;
    const uint8_t *numbers = row + 4 * groups;
    __m256 total[N];
    float rest[N];
    for (int r = 0; r < N; r++) total[r] = _mm256_setzero_ps(), rest[r] = 0;
    for (int64_t g = 0; g < groups; g++) {
        const float least = meaning_of(row, g).least;
        for (int r = 0; r < N; r++) rest[r] += least * x.sum[(first + r) * x.groups + g];
    }
    for (int64_t i = 0; i < bytes; i += 32) {
        _mm_prefetch((const char *)(numbers + i + (ahead - row)), _MM_HINT_NTA);
        // 16 bytes of a group of 32 may end a row.
        const __m256i w = bytes - i >= 32 ? _mm256_loadu_si256((const __m256i *)(numbers + i))
                                          : _mm256_zextsi128_si256(_mm_loadu_si128((const __m128i *)(numbers + i)));
        const int64_t g = i / one, next = one == 16 && bytes - i >= 32 ? g + 1 : g;
        const float low = meaning_of(row, g).scale, high = meaning_of(row, next).scale;
        for (int r = 0; r < N; r++) {
            const int64_t line = (first + r) * x.length, at = (first + r) * x.groups;
            const int8_t *q = &x.narrow[line + (BITS == 8 ? i : i / 64 * 128 + i % 64)];
            const __m256 product = _mm256_cvtepi32_ps(products<BITS>(_mm256_setzero_si256(), w, q));
            const __m128 a = _mm_set1_ps(low * x.scale[at + g]), b = _mm_set1_ps(high * x.scale[at + next]);
            total[r] = _mm256_fmadd_ps(_mm256_set_m128(b, a), product, total[r]);
        }
    }
    for (int r = 0; r < N; r++) found[r * apart] = sum8(total[r]) + rest[r];
}

// ---- AVX512 with VNNI: 64 bytes at a time ----

// Lane by lane, which of the groups in 64 bytes (1, 2 or 4 of them) its numbers belong to.
template <int HELD> AVX512 inline __m512i group_of_lane() {
    if (HELD == 1) return _mm512_setzero_si512();
    if (HELD == 2) return _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    return _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
}

// sums += the numbers in 64 bytes times those of a row of x.
template <int BITS> AVX512 inline __m512i products(__m512i sums, __m512i bytes, const int8_t *q) {
    if (BITS == 8) return _mm512_dpbusd_epi32(sums, bytes, _mm512_load_si512(q));
    const __m512i low = _mm512_set1_epi8(15);
    sums = _mm512_dpbusd_epi32(sums, _mm512_and_si512(bytes, low), _mm512_load_si512(q));
    return _mm512_dpbusd_epi32(sums, _mm512_and_si512(_mm512_srli_epi16(bytes, 4), low), _mm512_load_si512(q + 64));
}

// Numbers of rows of x, of which three at a time are in reach of one address.
template <class T> struct Places {
    const T *first, *fourth, *seventh;
    int64_t apart;

    Places(const T *base, int64_t apart) : first(base), fourth(base + 3 * apart), seventh(base + 6 * apart), apart(apart) {}
    const T *operator[](int r) const { return (r < 3 ? first : r < 6 ? fourth : seventh) + r % 3 * apart; }
    void move(int64_t n) { first += n, fourth += n, seventh += n; }
};

// The same of one or two.
template <class T> struct Near {
    const T *first;
    int64_t apart;

    const T *operator[](int r) const { return first + r * apart; }
};

// For 16 groups from group g on, of which there are `left`: adds the least values times the rows' sums, and finds the factor of
// each group. Factors stay in registers, because what was just stored is slow to load in pieces.
template <int N, class Rowwise>
AVX512 inline __attribute__((always_inline)) void add_least(__m512 *total, __m512 *factor, const uint8_t *row, const uint8_t *ahead, int64_t left,
                                                            const Rowwise &steps, const Rowwise &x_sums, int64_t g) {
    _mm_prefetch((const char *)ahead, _MM_HINT_NTA);
    const __m512i both = _mm512_maskz_loadu_epi32(wide::first(left), row);
    const __m512 scale = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(both));
    const __m512 least = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(both, 16)));
    for (int r = 0; r < N; r++) {
        total[r] = _mm512_fmadd_ps(least, _mm512_load_ps(x_sums[r] + g), total[r]);
        factor[r] = _mm512_mul_ps(scale, _mm512_load_ps(steps[r] + g));
    }
}

// The sums of up to 16 groups with N rows of x; `numbers` and `q` move on.
template <int BITS, int GROUP, int N, bool WHOLE>
AVX512 inline void add_groups(__m512 *total, const __m512 *factor, const uint8_t *&numbers, int64_t asked, Places<int8_t> &q,
                              int64_t left) {
    constexpr int STEP = 512 / BITS, BLOCK = STEP > GROUP ? STEP : GROUP, HELD = BLOCK / GROUP;
    __m512i which = group_of_lane<HELD>();
    for (int i = 0; i < (WHOLE ? 16 * GROUP : left); i += BLOCK) {
        __m512i sums[N];
        for (int r = 0; r < N; r++) sums[r] = _mm512_setzero_si512();
        for (int j = 0; j < BLOCK; j += STEP) {
            _mm_prefetch((const char *)(numbers + asked), _MM_HINT_NTA);
            const bool full = WHOLE || BLOCK == GROUP || left - i - j >= STEP;
            const __m512i bytes = full ? _mm512_loadu_si512(numbers) :
                                         _mm512_maskz_loadu_epi8(first_bytes((left - i - j) * BITS / 8), numbers);
            for (int r = 0; r < N; r++) sums[r] = products<BITS>(sums[r], bytes, q[r]);
            numbers += 64, q.move(STEP);
        }
        for (int r = 0; r < N; r++)
            total[r] = _mm512_fmadd_ps(_mm512_permutexvar_ps(which, factor[r]), _mm512_cvtepi32_ps(sums[r]), total[r]);
        which = _mm512_add_epi32(which, _mm512_set1_epi32(HELD));
    }
}

template <int BITS, int GROUP, int N>
AVX512 void dot_avx512(const Matrix &m, const uint8_t *row, int64_t count, const uint8_t *ahead, const Rows &x, int64_t first,
                       float *found, int64_t apart) {
    const int64_t groups = m.in / GROUP, asked = ahead - row;
    const Places<float> steps(&x.scale[first * x.groups], x.groups), x_sums(&x.sum[first * x.groups], x.groups);
    __m512 of_rows[N][TOGETHER];
    for (int64_t one = 0; one < count; one++, row += m.stride) {
        const uint8_t *numbers = row + 4 * groups;
        Places<int8_t> q(&x.narrow[first * x.length], x.length);
        __m512 total[N], factor[N];
        for (int r = 0; r < N; r++) total[r] = _mm512_setzero_ps();
        for (int64_t g = 0; g < groups; g += 16) {
            add_least<N>(total, factor, row + 4 * g, row + asked + 4 * g, groups - g, steps, x_sums, g);
            if (groups - g >= 16) add_groups<BITS, GROUP, N, true>(total, factor, numbers, asked, q, 16 * GROUP);
            else add_groups<BITS, GROUP, N, false>(total, factor, numbers, asked, q, m.in - g * GROUP);
        }
        for (int r = 0; r < N; r++) of_rows[r][one] = total[r];
    }
    for (int r = 0; r < N; r++) wide::store_sums(found + r * apart, of_rows[r], count);
}

// For one or two rows of x, whose addresses fit into registers anyway: from memory, this order is 6 to 18 % faster then.
template <int BITS, int GROUP, int N>
AVX512 void near_avx512(const Matrix &m, const uint8_t *row, int64_t count, const uint8_t *ahead, const Rows &x, int64_t first,
                        float *found, int64_t apart) {
    constexpr int STEP = 512 / BITS, BLOCK = STEP > GROUP ? STEP : GROUP, HELD = BLOCK / GROUP;
    const int64_t groups = m.in / GROUP, asked = ahead - row, length = x.length, x_groups = x.groups;
    const int8_t *base = &x.narrow[first * length];
    const Near<float> steps{&x.scale[first * x_groups], x_groups}, x_sums{&x.sum[first * x_groups], x_groups};
    __m512 of_rows[N][TOGETHER];
    for (int64_t one = 0; one < count; one++, row += m.stride) {
        const uint8_t *numbers = row + 4 * groups;
        __m512 total[N], factor[N];
        for (int r = 0; r < N; r++) total[r] = _mm512_setzero_ps();
        for (int64_t g = 0; g < groups; g += 16) {
            add_least<N>(total, factor, row + 4 * g, row + asked + 4 * g, groups - g, steps, x_sums, g);
            __m512i which = group_of_lane<HELD>();
            const int64_t end = std::min(m.in, (g + 16) * GROUP);
            for (int64_t i = g * GROUP; i < end; i += BLOCK) {
                __m512i sums[N];
                for (int r = 0; r < N; r++) sums[r] = _mm512_setzero_si512();
                for (int64_t j = i; j < i + BLOCK; j += STEP) {
                    const uint8_t *at = numbers + j * BITS / 8;
                    _mm_prefetch((const char *)(at + asked), _MM_HINT_NTA);
                    const bool whole = BLOCK == GROUP || end - j >= STEP;
                    const __m512i bytes = whole ? _mm512_loadu_si512(at) :
                                                _mm512_maskz_loadu_epi8(first_bytes((end - j) * BITS / 8), at);
                    for (int r = 0; r < N; r++) sums[r] = products<BITS>(sums[r], bytes, base + r * length + j);
                }
                for (int r = 0; r < N; r++)
                    total[r] = _mm512_fmadd_ps(_mm512_permutexvar_ps(which, factor[r]), _mm512_cvtepi32_ps(sums[r]), total[r]);
                which = _mm512_add_epi32(which, _mm512_set1_epi32(HELD));
            }
        }
        for (int r = 0; r < N; r++) of_rows[r][one] = total[r];
    }
    for (int r = 0; r < N; r++) wide::store_sums(found + r * apart, of_rows[r], count);
}

// The products for 1 to MOST rows, of a function whose last argument is their number.
#define EACH(...) {each<__VA_ARGS__ 1>>, each<__VA_ARGS__ 2>>, each<__VA_ARGS__ 3>>, each<__VA_ARGS__ 4>>, \
                   each<__VA_ARGS__ 5>>, each<__VA_ARGS__ 6>>, each<__VA_ARGS__ 7>>, each<__VA_ARGS__ 8>>}
const Dot PLAIN[] = EACH(dot_plain<);
const Dot HALF[2][MOST] = {EACH(dot_avx2<4,), EACH(dot_avx2<8,)};
#define WIDE(bits, group) {near_avx512<bits, group, 1>, near_avx512<bits, group, 2>, dot_avx512<bits, group, 3>, \
                           dot_avx512<bits, group, 4>, dot_avx512<bits, group, 5>, dot_avx512<bits, group, 6>, \
                           dot_avx512<bits, group, 7>, dot_avx512<bits, group, 8>}
const Dot WHOLE[2][3][MOST] = {
    {WIDE(4, 32), WIDE(4, 64), WIDE(4, 128)},
    {WIDE(8, 32), WIDE(8, 64), WIDE(8, 128)},
};

}  // namespace

const Dot *group_dots(const Matrix &matrix, int level) {
    if (level >= 2) return WHOLE[matrix.bits == 8][matrix.group / 64];
    return level == 1 ? HALF[matrix.bits == 8] : PLAIN;
}

}  // namespace rows
