// A token's sum over its rows, which come from as many experts and lie anywhere: added up group by group of experts, while the
// next group's are computed. Products leave memory idle, and sums do little but wait for it.
#pragma once

#include <omp.h>

#include "experts.h"
#include "tiles.h"

WIDE_BEGIN

namespace tiles {

constexpr int64_t BATCH = 512;  // lines of the tokens that are added up together: they wait in the second cache
constexpr int64_t SOON = 8;     // tokens whose places are asked for before their rows are
constexpr int64_t EIGHT = 8;    // whole numbers of a vector

inline int64_t lines_of(int64_t bytes) { return (bytes + LINE - 1) / LINE; }

// The rows of a token that lie in a group, and their weights.
template <class Number> struct Token {
    rows::Buffer<const Number *> rows;
    rows::Buffer<float> weights;
    int64_t n = 0;
    explicit Token(int64_t top_k) : rows(top_k + EIGHT), weights(top_k + EIGHT) {}
};

// One thread's share of all tokens' sums. `sums` is where a group leaves what it gave to the next one, [n_tokens, width].
template <class Type> class Combine {
    using Number = typename Type::Number;
    const moekit_experts &e;
    const bool weighted;
    float *const sums;
    Number *const out;
    const int64_t first, end;              // tokens
    int64_t added, asked, known;           // those before are added up; were asked for; are asked for now
    int64_t group = 0;
    const Number *group_rows = nullptr;
    rows::Buffer<const char *> all;        // lines, and room for what a product takes beyond them
    int64_t n_lines = 0, taken = 0;
    Token<Number> own, next, later;

  public:
    // `words` is the longest inner dimension of a product. All threads do this at once.
    Combine(const moekit_experts &experts, bool weighted_, float *sums_, Number *out_, int64_t words)
        : e(experts), weighted(weighted_), sums(sums_), out(out_), first(share(omp_get_thread_num())), end(share(omp_get_thread_num() + 1)), added(end), asked(end), known(end),
          all(BATCH + e.top_k * lines_of(e.width * sizeof(Number)) + lines_of(e.width * sizeof(float)) + 2 * lines_of(e.top_k * sizeof(int64_t)) + EIGHT + words / EVERY + 1, (const char *)this),
          own(e.top_k), next(e.top_k), later(e.top_k) {}

    // All rows of a group are there, the first at `at`.
    void begin(int64_t g, const Number *at) {
        group = g, group_rows = at, added = asked = known = first;
        ask_for_more();
    }

    // What a product shall ask for;
    Elsewhere lines() const { return asked < end ? &all[taken] : nullptr; }

    // and what follows one of so many words: tokens that were asked for long enough ago are added up.
    void after(int64_t words) {
        if (asked == end || (taken += words / EVERY) < n_lines) return;
        catch_up();
    }

    // Adds up all tokens that are left.
    void finish() {
        if (added < end) find(added, next), find(added + 1, later);
        for (; added < end; added++) {
            std::swap(own, next), std::swap(next, later);
            find(added + 2, later);
            // Little of many rows at a time, so that what is asked for comes from many places of memory.
            add<1>(added, &later);
        }
        asked = known = end;
    }

  private:
    int64_t share(int64_t thread) const { return thread * e.n_tokens / omp_get_num_threads(); }

    // A call, for it is seldom: as a part of each product's loop it would take room there.
    __attribute__((noinline)) void catch_up() {
        for (; added < asked; added++) find(added, own), add<4>(added, nullptr);
        asked = known;
        ask_for_more();
    }

    void ask_for_more() {
        for (n_lines = taken = 0; known < end && n_lines < BATCH; known++) {
            find(known, own);
            for (int64_t i = 0; i < own.n; i++) put(own.rows[i], e.width * sizeof(Number));
            if (sums) put(sums + known * e.width, e.width * sizeof(float));
            const int64_t soon = std::min(known + SOON, end - 1) * e.top_k;
            put(e.places + soon, e.top_k * sizeof(int64_t));
            if (weighted) put(e.weights + soon, e.top_k * sizeof(float));
        }
    }

    // Lines from here on are to be asked for; eight are written at a time.
    void put(const void *at, int64_t bytes) {
        const __m512i eight = _mm512_setr_epi64(0, LINE, 2 * LINE, 3 * LINE, 4 * LINE, 5 * LINE, 6 * LINE, 7 * LINE);
        const int64_t count = lines_of(bytes);
        for (int64_t i = 0; i < count; i += EIGHT) _mm512_storeu_si512(&all[n_lines + i], _mm512_add_epi64(_mm512_set1_epi64((int64_t)at + i * LINE), eight));
        n_lines += count;
    }

    // The rows of token t, if there is one; eight places are written at a time.
    void find(int64_t t, Token<Number> &token) const {
        const int64_t begin = e.bounds[e.groups[group]], size = e.bounds[e.groups[group + 1]] - begin;
        token.n = 0;
        for (int64_t k = 0; t < e.n_tokens && k < e.top_k; k += EIGHT) {
            const __mmask8 there = __mmask8(wide::first(std::min(e.top_k - k, EIGHT)));
            const int64_t at = t * e.top_k + k;
            const __m512i rows = _mm512_sub_epi64(_mm512_maskz_loadu_epi64(there, e.places + at), _mm512_set1_epi64(begin));
            // As numbers without a sign, rows of earlier groups are large.
            const __mmask8 here = _mm512_mask_cmplt_epu64_mask(there, rows, _mm512_set1_epi64(size));
            const __m512i where = _mm512_add_epi64(_mm512_set1_epi64((int64_t)group_rows), _mm512_mullo_epi64(rows, _mm512_set1_epi64(e.width * sizeof(Number))));
            _mm512_storeu_si512(&token.rows[token.n], _mm512_maskz_compress_epi64(here, where));
            _mm256_storeu_ps(&token.weights[token.n], _mm256_maskz_compress_ps(here, weighted ? _mm256_maskz_loadu_ps(there, e.weights + at) : _mm256_set1_ps(1)));
            token.n += __builtin_popcount(here);
        }
    }

    // `own`, which is token t, by as many pairs of vectors at a time; the rows of a later one are asked for, if there is one.
    template <int PAIRS> void add(int64_t t, const Token<Number> *ahead) {
        int64_t d = 0;
        for (; d + PAIRS * 2 * LANES <= e.width; d += PAIRS * 2 * LANES) add_columns<PAIRS>(t, d, ahead);
        for (; d + 2 * LANES <= e.width; d += 2 * LANES) add_columns<1>(t, d, ahead);
        if (d < e.width) add_last(t, d);
    }

    // These pairs from column d on; the sum begins with what earlier groups gave.
    template <int PAIRS> void add_columns(int64_t t, int64_t d, const Token<Number> *ahead) {
        constexpr int64_t COUNT = PAIRS * 2 * LANES;
        float *const before = sums ? sums + t * e.width + d : nullptr;
        __m512 sum[PAIRS][2];
#pragma GCC unroll 4
        for (int p = 0; p < PAIRS; p++)
            for (int i = 0; i < 2; i++) sum[p][i] = group ? _mm512_loadu_ps(before + (2 * p + i) * LANES) : _mm512_setzero_ps();
        if (ahead && group)
            for (int64_t at = 0; at < COUNT; at += LINE / sizeof(float)) ask(before + e.width + at);
        for (int64_t i = 0; ahead && i < ahead->n; i++)
            for (int64_t at = 0; at < COUNT; at += LINE / sizeof(Number)) ask(ahead->rows[i] + d + at);
        for (int64_t i = 0; i < own.n; i++) {
            const __m512 factor = _mm512_set1_ps(own.weights[i]);
#pragma GCC unroll 4
            for (int p = 0; p < PAIRS; p++) {
                __m512 numbers[2];
                Type::load_two(own.rows[i] + d + p * 2 * LANES, numbers);
                for (int j = 0; j < 2; j++) sum[p][j] = _mm512_fmadd_ps(factor, numbers[j], sum[p][j]);
            }
        }
#pragma GCC unroll 4
        for (int p = 0; p < PAIRS; p++)
            if (group + 1 == e.n_groups) Type::store_two(out + t * e.width + d + p * 2 * LANES, sum[p]);
            else for (int i = 0; i < 2; i++) _mm512_storeu_ps(before + (2 * p + i) * LANES, sum[p][i]);
    }

    // The last vector, where there are not whole pairs.
    void add_last(int64_t t, int64_t d) {
        float *const before = sums ? sums + t * e.width + d : nullptr;
        __m512 sum = group ? _mm512_loadu_ps(before) : _mm512_setzero_ps();
        for (int64_t i = 0; i < own.n; i++) sum = _mm512_fmadd_ps(_mm512_set1_ps(own.weights[i]), Type::load(own.rows[i] + d), sum);
        if (group + 1 == e.n_groups) Type::store(out + t * e.width + d, sum);
        else _mm512_storeu_ps(before, sum);
    }
};

}  // namespace tiles

WIDE_END
