// One token's choice, in plain loops and for AVX512.

#include "choice.h"

#include <cmath>
#include <limits>

#include "tiles.h"

namespace {

using namespace choice;

// Numbers are raised to it, and what is taken falls below it: so nothing is taken twice.
constexpr float LOWEST = std::numeric_limits<float>::lowest();

void score_plain(const float *logits, float *scores, int64_t n, int kind) {
    if (kind == SOFTMAX) {
        const float most = *std::max_element(logits, logits + n);
        float total = 0;
        for (int64_t i = 0; i < n; i++) total += scores[i] = std::exp(logits[i] - most);
        for (int64_t i = 0; i < n; i++) scores[i] /= total;
        return;
    }
    for (int64_t i = 0; i < n; i++) {
        if (kind == SIGMOID) scores[i] = 1 / (1 + std::exp(-logits[i]));
        else scores[i] = std::sqrt(std::max(logits[i] > 20 ? logits[i] : std::log1p(std::exp(logits[i])), std::numeric_limits<float>::min()));
    }
}

int64_t best_plain(const float *numbers, int64_t n) { return std::max_element(numbers, numbers + n) - numbers; }

}  // namespace

WIDE_BEGIN

namespace {

using namespace tiles;

inline __m512 lanes(const float *numbers, int64_t left, float otherwise) {
    return _mm512_mask_loadu_ps(_mm512_set1_ps(otherwise), first(left), numbers);
}

void score_wide(const float *logits, float *scores, int64_t n, int kind) {
    if (kind == SIGMOID) {
        for (int64_t i = 0; i < n; i += LANES) _mm512_mask_storeu_ps(scores + i, first(n - i), sigmoid(lanes(logits + i, n - i, 0)));
        return;
    }
    __m512 greatest = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < n; i += LANES) greatest = _mm512_max_ps(greatest, lanes(logits + i, n - i, -INFINITY));
    const __m512 most = _mm512_set1_ps(_mm512_reduce_max_ps(greatest));
    for (int64_t i = 0; i < n; i += LANES) {
        const __m512 found = exponential(_mm512_sub_ps(lanes(logits + i, n - i, 0), most));
        sum = _mm512_mask_add_ps(sum, first(n - i), sum, found);
        _mm512_mask_storeu_ps(scores + i, first(n - i), found);
    }
    const __m512 total = _mm512_set1_ps(_mm512_reduce_add_ps(sum));
    for (int64_t i = 0; i < n; i += LANES) _mm512_mask_storeu_ps(scores + i, first(n - i), _mm512_div_ps(lanes(scores + i, n - i, 0), total));
}

int64_t best_wide(const float *numbers, int64_t n) {
    __m512 even = _mm512_set1_ps(-INFINITY), odd = even;
    for (int64_t i = 0; i < n; i += 2 * LANES) {
        even = _mm512_max_ps(even, lanes(numbers + i, n - i, -INFINITY));
        if (i + LANES < n) odd = _mm512_max_ps(odd, lanes(numbers + i + LANES, n - i - LANES, -INFINITY));
    }
    const __m512 most = _mm512_set1_ps(_mm512_reduce_max_ps(_mm512_max_ps(even, odd)));
    for (int64_t i = 0; i < n; i += LANES)
        if (const __mmask16 found = _mm512_mask_cmp_ps_mask(first(n - i), lanes(numbers + i, n - i, 0), most, _CMP_EQ_OQ)) return i + __builtin_ctz(found);
    return 0;
}

// Those of 16 numbers that are there, raised to LOWEST; -infinity for the others.
inline __m512 raised(const float *numbers, int64_t left) {
    const __m512 found = lanes(numbers, left, -INFINITY);
    return _mm512_mask_max_ps(found, first(left), found, _mm512_set1_ps(LOWEST));
}

inline int count(__mmask16 found) { return __builtin_popcount(found); }

// How many of V * LANES numbers are better than each: greater, or as great and before it. Those from the `n`th on are none.
template <int V> void count_better(const float *numbers, int64_t n, __m512i (&better)[V]) {
    const __m512i one = _mm512_set1_epi32(1);
    __m512 all[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) all[v] = _mm512_loadu_ps(numbers + v * LANES), better[v] = _mm512_setzero_si512();
#pragma GCC unroll 8
    for (int v = 0; v < V; v++)
        for (int64_t lane = 0; lane < std::min<int64_t>(LANES, n - v * LANES); lane++) {
            const __m512 own = _mm512_set1_ps(numbers[v * LANES + lane]);
            const __mmask16 later = __mmask16(0xfffe << lane);
#pragma GCC unroll 8
            for (int u = 0; u < V; u++) {
                __mmask16 worse = u > v ? _mm512_cmp_ps_mask(all[u], own, _CMP_LE_OQ) : _mm512_cmp_ps_mask(all[u], own, _CMP_LT_OQ);
                if (u == v) worse |= _mm512_mask_cmp_ps_mask(later, all[u], own, _CMP_EQ_OQ);
                better[u] = _mm512_mask_add_epi32(better[u], worse, better[u], one);
            }
        }
}

// A bound that `wanted` of n numbers reach, and few others: of the greatest of each of at most V * LANES lanes, the last that
// is wanted. The lanes are twice as many as wanted, or more.
template <int V> __m512 reached(const float *numbers, int64_t n, int64_t wanted) {
    if constexpr (V > 1) {
        if (wanted <= V * LANES / 4) return reached<V / 2>(numbers, n, wanted);
    }
    __m512 most[V], least = _mm512_set1_ps(INFINITY);
    __m512i better[V];
    float lane[V * LANES];
    for (__m512 &each : most) each = _mm512_set1_ps(-INFINITY);
    for (int64_t i = 0; i < n; i += V * LANES)
        for (int v = 0; v < V; v++) most[v] = _mm512_max_ps(most[v], raised(numbers + i + v * LANES, n - i - v * LANES));
    for (int v = 0; v < V; v++) _mm512_storeu_ps(lane + v * LANES, most[v]);
    count_better<V>(lane, V * LANES, better);
    for (int v = 0; v < V; v++) least = _mm512_mask_min_ps(least, _mm512_cmplt_epi32_mask(better[v], _mm512_set1_epi32(int(wanted))), least, most[v]);
    return _mm512_set1_ps(_mm512_reduce_min_ps(least));
}

// Puts n of V * LANES places where they belong among those of greater and smaller numbers.
template <int V> void in_order(const float *numbers, const int32_t *where, int64_t n, int64_t *ordered) {
    if constexpr (V > 1) {
        if (n <= V * LANES / 2) return in_order<V / 2>(numbers, where, n, ordered);
    }
    __m512i better[V];
    int32_t place[V * LANES];
    count_better<V>(numbers, n, better);
    for (int v = 0; v < V; v++) _mm512_storeu_si512(place + v * LANES, better[v]);
    for (int64_t i = 0; i < n; i++) ordered[place[i]] = where[i];
}

// `greatest` in one pass: numbers that reach a bound are set apart, and the place of each among them is how many are better.
// Returns whether they were few; else nothing is found.
bool greatest_wide(const float *numbers, int64_t n, int64_t wanted, int64_t *places) {
    constexpr int V = 8;
    constexpr int64_t MOST = V * LANES;
    if (wanted > MOST / 2) return false;
    const __m512 bound = reached<V>(numbers, n, wanted);
    float apart[MOST + LANES];
    int32_t where[MOST + LANES];
    int64_t ordered[MOST], found = 0;
    __m512i at = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (int64_t i = 0; i < n; i += LANES, at = _mm512_add_epi32(at, _mm512_set1_epi32(LANES))) {
        const __m512 some = raised(numbers + i, n - i);
        const __mmask16 reach = _mm512_mask_cmp_ps_mask(first(n - i), some, bound, _CMP_GE_OQ);
        if (found + count(reach) > MOST) return false;
        _mm512_storeu_ps(apart + found, _mm512_maskz_compress_ps(reach, some));
        _mm512_storeu_si512(where + found, _mm512_maskz_compress_epi32(reach, at));
        found += count(reach);
    }
    in_order<V>(apart, where, found, ordered);
    std::copy_n(ordered, wanted, places);
    return true;
}

}  // namespace

WIDE_END

namespace {

// The places of the `wanted` greatest of n numbers, which are used up, best first; of equal ones the first. What is not a
// number comes last.
void greatest(float *numbers, int64_t n, int64_t wanted, int64_t *places, int level) {
    if (level >= 2 && greatest_wide(numbers, n, wanted, places)) return;
    for (int64_t i = 0; i < n; i++) numbers[i] = numbers[i] > LOWEST ? numbers[i] : LOWEST;
    for (int64_t k = 0; k < wanted; k++) {
        places[k] = level >= 2 ? best_wide(numbers, n) : best_plain(numbers, n);
        numbers[places[k]] = -INFINITY;
    }
}

// Experts outside the best groups fall to -infinity; a group is worth the sum of its best `summed`.
void close_groups(const Choice &choice, float *ranking, float *room, int level) {
    const int64_t size = choice.n_experts / choice.n_groups;
    std::vector<float> worth(choice.n_groups, 0.0f);
    std::vector<int64_t> best(std::max(choice.summed, choice.top_k_groups));
    for (int64_t g = 0; g < choice.n_groups; g++) {
        std::copy_n(ranking + g * size, size, room);
        greatest(room, size, choice.summed, best.data(), level);
        for (int64_t i = 0; i < choice.summed; i++) worth[g] += ranking[g * size + best[i]];
    }
    std::vector<bool> open(choice.n_groups, false);
    greatest(worth.data(), choice.n_groups, choice.top_k_groups, best.data(), level);
    for (int64_t i = 0; i < choice.top_k_groups; i++) open[best[i]] = true;
    for (int64_t i = 0; i < choice.n_experts; i++)
        if (!open[i / size]) ranking[i] = -INFINITY;
}

}  // namespace

namespace choice {

void score(const float *logits, float *scores, int64_t n, int kind, int level) {
    if (level >= 2 && kind != SQRT_SOFTPLUS) score_wide(logits, scores, n, kind);
    else score_plain(logits, scores, n, kind);
}

void raw_weights(const Choice &choice, const float *logits, const float *scores, const int64_t *experts, float *weights, int level) {
    for (int64_t k = 0; k < choice.top_k; k++) weights[k] = (choice.late ? logits : scores)[experts[k]];
    if (choice.late) score(weights, weights, choice.top_k, choice.score, level);
}

void choose(const Choice &choice, const float *logits, float *scores, int64_t *experts, float *weights, float *room, int level) {
    score(logits, scores, choice.n_experts, choice.score, level);
    std::copy_n(scores, choice.n_experts, room);
    for (int64_t i = 0; choice.factor && i < choice.n_experts; i++) room[i] *= choice.factor[i];
    for (int64_t i = 0; choice.bias && i < choice.n_experts; i++) room[i] += choice.bias[i];
    if (choice.top_k_groups < choice.n_groups) close_groups(choice, room, room + choice.n_experts, level);
    greatest(room, choice.n_experts, choice.top_k, experts, level);
    raw_weights(choice, logits, scores, experts, weights, level);
    const float factor = float(choice.scale), sum = choice.renormalise ? divisor(choice, weights) : 1;
    for (int64_t k = 0; k < choice.top_k; k++) weights[k] = weights[k] / sum * factor;
}

}  // namespace choice
