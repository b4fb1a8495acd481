// Causal attention in bfloat16, forward and backward (arXiv 2205.14135): scores exist for 64 queries at a time, or for 64
// queries and 64 keys, so that they stay in the processor's cache; what lies in a query's future is not computed, but in
// the blocks on the diagonal. Products take bfloat16 and sum in float32. One head at a time for each thread.
//
// All products are sums over pairs of bfloat16 (vdpbf16ps): of the left matrix one pair is spread over a vector, of the
// right matrix 16 columns are read, whose two rows lie side by side ("paired").

#include <immintrin.h>
#include <vector>

#include "loops.h"

extern "C" {

// [B, H, S, width] in bfloat16; steps count numbers.
struct moekit_heads {
    uint16_t *first;
    int64_t batch_step, head_step, row_step;
};

struct moekit_attention {
    moekit_heads q, k, v, out, grad_out, grad_q, grad_k, grad_v;
    float *normaliser;  // [B, H, S]: the logarithm (base 2) of each query's sum of exponentials
    int64_t batch, heads, length, qk_width, v_width;
    float scale;
};
}

namespace {

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma")))

constexpr int64_t BLOCK = 64;  // queries, and keys, at a time
constexpr int ROWS = 4;        // of a product in registers, times 4 vectors of 16 columns

int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

struct Rows {
    uint16_t *first;
    int64_t step;
    uint16_t *operator[](int64_t row) const { return first + row * step; }
};

Rows rows_of(const moekit_heads &heads, int64_t b, int64_t h) {
    return {heads.first + b * heads.batch_step + h * heads.head_step, heads.row_step};
}

// A left matrix: the pair `step` of row r is at first[r * row + step * pair].
struct Left {
    const uint32_t *first;
    int64_t row, pair;
};

template <int VECTORS>
AVX512 inline void product_tile(Left a, const uint32_t *b, int64_t b_step, int64_t pairs, float *c, int64_t c_step, bool add) {
    __m512 total[ROWS][VECTORS];
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < VECTORS; v++) total[r][v] = add ? _mm512_loadu_ps(c + r * c_step + 16 * v) : _mm512_setzero_ps();
    for (int64_t p = 0; p < pairs; p++) {
        __m512bh right[VECTORS];
        for (int v = 0; v < VECTORS; v++) right[v] = (__m512bh)_mm512_loadu_si512(b + p * b_step + 16 * v);
        for (int r = 0; r < ROWS; r++) {
            const __m512bh left = (__m512bh)_mm512_set1_epi32(int(a.first[r * a.row + p * a.pair]));
            for (int v = 0; v < VECTORS; v++) total[r][v] = _mm512_dpbf16_ps(total[r][v], left, right[v]);
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < VECTORS; v++) _mm512_storeu_ps(c + r * c_step + 16 * v, total[r][v]);
}

// c [BLOCK, columns] = (or += with `add`) a [BLOCK, 2 pairs] b; columns are a multiple of 16.
AVX512 void product(Left a, const uint32_t *b, int64_t b_step, int64_t pairs, float *c, int64_t c_step, int64_t columns, bool add) {
    for (int64_t column = 0; column < columns; column += 64)
        for (int64_t r = 0; r < BLOCK; r += ROWS) {
            const Left left{a.first + r * a.row, a.row, a.pair};
            float *to = c + r * c_step + column;
            switch (std::min<int64_t>((columns - column) / 16, 4)) {
            case 1: product_tile<1>(left, b + column, b_step, pairs, to, c_step, add); break;
            case 2: product_tile<2>(left, b + column, b_step, pairs, to, c_step, add); break;
            case 3: product_tile<3>(left, b + column, b_step, pairs, to, c_step, add); break;
            default: product_tile<4>(left, b + column, b_step, pairs, to, c_step, add);
            }
        }
}

// 2^x, to 2e-7 of it.
AVX512 inline __m512 exp2_of(__m512 x) {
    const __m512 whole = _mm512_roundscale_ps(x, 0), rest = _mm512_sub_ps(x, whole);
    __m512 sum = _mm512_set1_ps(1.54035304e-4f);
    for (float coefficient : {1.33335581e-3f, 9.61812911e-3f, 5.55041087e-2f, 2.40226507e-1f, 6.93147181e-1f, 1.0f})
        sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(coefficient));
    return _mm512_scalef_ps(sum, whole);
}

// Which of 16 keys from `key` on query `query` sees.
inline __mmask16 seen(int64_t query, int64_t key) {
    return query - key >= 15 ? 0xffff : query < key ? 0 : __mmask16((2u << (query - key)) - 1);
}

// ---- operands in the order that products want: padded with zeros ----

// Rows [begin, begin + BLOCK) as they are, `step` pairs long.
void copied(Rows rows, int64_t begin, int64_t length, int64_t width, uint32_t *to, int64_t step) {
    std::memset(to, 0, BLOCK * step * 4);
    for (int64_t r = 0; r < std::min(BLOCK, length - begin); r++) std::memcpy(to + r * step, rows[begin + r], 2 * width);
}

// A matrix whose columns are paired, transposed: pair p of row r goes to to[p * step + r], for BLOCK rows.
AVX512 void transposed(const uint32_t *rows, int64_t row_step, int64_t pairs, uint32_t *to, int64_t step) {
    for (int64_t r = 0; r < BLOCK; r += 16)
        for (int64_t p = 0; p < pairs; p++)
            for (int64_t i = 0; i < 16; i++) to[p * step + r + i] = rows[(r + i) * row_step + p];
}

// Rows 2 p and 2 p + 1 side by side, for BLOCK rows of `columns` numbers.
AVX512 void paired(const uint32_t *rows, int64_t row_step, int64_t columns, uint32_t *to, int64_t step) {
    for (int64_t p = 0; p < BLOCK / 2; p++) {
        const uint16_t *even = (const uint16_t *)(rows + 2 * p * row_step), *odd = even + 2 * row_step;
        for (int64_t c = 0; c < columns; c++) to[p * step + c] = even[c] | uint32_t(odd[c]) << 16;
    }
}

AVX512 void rounded(const float *from, int64_t from_step, Rows to, int64_t begin, int64_t length, int64_t width) {
    for (int64_t r = 0; r < std::min(BLOCK, length - begin); r++)
        for (int64_t c = 0; c < width; c += 16) {
            const __mmask16 inside = width - c >= 16 ? 0xffff : __mmask16((1u << (width - c)) - 1);
            const __m256i narrow = (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(inside, from + r * from_step + c));
            _mm256_mask_storeu_epi16(to[begin + r] + c, inside, narrow);
        }
}

// What one thread works in. Widths and lengths are padded: `qk` and `v` to 32 numbers, keys to BLOCK.
struct Scratch {
    int64_t keys, qk, v;
    std::vector<uint32_t> rows, q, q_paired, grad, grad_paired, keys_across, keys_paired, values;
    std::vector<uint32_t> slopes, slopes_paired, shares_paired;
    std::vector<float> scores, sums, grad_q, grad_k, grad_v, wide;

    Scratch(const moekit_attention &job, bool backward)
        : keys(padded(job.length, BLOCK)), qk(padded(job.qk_width, 32)), v(padded(job.v_width, 32)) {
        const int64_t widest = std::max(qk, v);
        rows.resize(BLOCK * widest / 2), q.resize(BLOCK * qk / 2);
        keys_across.resize(qk / 2 * keys), values.resize(v / 2 * keys);
        wide.resize(BLOCK * std::max(widest, BLOCK));
        if (!backward) {
            scores.resize(BLOCK * keys), sums.resize(BLOCK), slopes.resize(BLOCK * BLOCK / 2);
            return;
        }
        scores.resize(2 * BLOCK * BLOCK), sums.resize(BLOCK);
        q_paired.resize(BLOCK / 2 * qk), grad.resize(BLOCK * v / 2), grad_paired.resize(BLOCK / 2 * v);
        keys_paired.resize(keys / 2 * qk);
        for (auto *square : {&slopes, &slopes_paired, &shares_paired}) square->resize(BLOCK * BLOCK / 2);
        grad_q.resize(BLOCK * qk), grad_k.resize(keys * qk), grad_v.resize(keys * v);
    }
};

// ---- forward ----

// The exponentials of a block's scores with BLOCK keys from `key` on, in bfloat16, and their sums.
AVX512 void exponentials(Scratch &s, int64_t query, int64_t key, const float *largest, float factor) {
    for (int64_t r = 0; r < BLOCK; r++) {
        const __m512 top = _mm512_set1_ps(largest[r] * factor);
        __m512 sum = _mm512_setzero_ps();
        for (int64_t c = 0; c < BLOCK; c += 16) {
            const __m512 score = _mm512_loadu_ps(&s.scores[r * s.keys + key + c]);
            const __m512 power = exp2_of(_mm512_fmsub_ps(score, _mm512_set1_ps(factor), top));
            const __m512 share = _mm512_maskz_mov_ps(seen(query + r, key + c), power);
            sum = _mm512_add_ps(sum, share);
            _mm256_storeu_si256((__m256i *)&s.slopes[(r * BLOCK + c) / 2], (__m256i)_mm512_cvtneps_pbh(share));
        }
        s.sums[r] += _mm512_reduce_add_ps(sum);
    }
}

AVX512 float largest_of(const float *scores, int64_t query) {
    __m512 found = _mm512_set1_ps(-INFINITY);
    for (int64_t key = 0; key <= query; key += 16)
        found = _mm512_mask_max_ps(found, seen(query, key), found, _mm512_loadu_ps(scores + key));
    return _mm512_reduce_max_ps(found);
}

AVX512 void forward_block(const moekit_attention &job, Scratch &s, Rows q, Rows out, float *normaliser, int64_t query) {
    const float factor = job.scale * LOG2_E;
    copied(q, query, job.length, job.qk_width, s.q.data(), s.qk / 2);
    for (int64_t key = 0; key <= query; key += BLOCK)
        product({s.q.data(), s.qk / 2, 1}, &s.keys_across[key], s.keys, s.qk / 2, &s.scores[key], s.keys, BLOCK, false);
    float largest[BLOCK];
    for (int64_t r = 0; r < BLOCK; r++) largest[r] = largest_of(&s.scores[r * s.keys], query + r);
    std::fill(s.sums.begin(), s.sums.end(), 0.0f);
    for (int64_t key = 0; key <= query; key += BLOCK) {
        exponentials(s, query, key, largest, factor);
        product({s.slopes.data(), BLOCK / 2, 1}, &s.values[key / 2 * s.v], s.v, BLOCK / 2, s.wide.data(), s.v, s.v, key > 0);
    }
    for (int64_t r = 0; r < std::min(BLOCK, job.length - query); r++) {
        for (int64_t c = 0; c < s.v; c++) s.wide[r * s.v + c] /= s.sums[r];
        normaliser[query + r] = largest[r] * factor + std::log2(s.sums[r]);
    }
    rounded(s.wide.data(), s.v, out, query, job.length, job.v_width);
}

AVX512 void forward_head(const moekit_attention &job, Scratch &s, int64_t b, int64_t h) {
    const Rows k = rows_of(job.k, b, h), v = rows_of(job.v, b, h);
    for (int64_t key = 0; key < s.keys; key += BLOCK) {
        copied(k, key, job.length, job.qk_width, s.rows.data(), s.qk / 2);
        transposed(s.rows.data(), s.qk / 2, s.qk / 2, &s.keys_across[key], s.keys);
        copied(v, key, job.length, job.v_width, s.rows.data(), s.v / 2);
        paired(s.rows.data(), s.v / 2, s.v, &s.values[key / 2 * s.v], s.v);
    }
    float *normaliser = job.normaliser + (b * job.heads + h) * job.length;
    for (int64_t query = 0; query < job.length; query += BLOCK)
        forward_block(job, s, rows_of(job.q, b, h), rows_of(job.out, b, h), normaliser, query);
}

// ---- backward: with p the probabilities, grad_s = scale p (grad_p - sum(grad_out out)) ----

// Probabilities and gradients of scores of BLOCK queries and keys, in bfloat16: paired, the latter as rows as well.
AVX512 void slopes_of(const moekit_attention &job, Scratch &s, const float *normaliser, int64_t query, int64_t key) {
    const float *scores = s.scores.data(), *grads = scores + BLOCK * BLOCK;
    const __m512 factor = _mm512_set1_ps(job.scale * LOG2_E), scale = _mm512_set1_ps(job.scale);
    for (int64_t r = 0; r < BLOCK; r += 2)
        for (int64_t c = 0; c < BLOCK; c += 16) {
            __m512i share[2], slope[2];
            for (int64_t i = 0; i < 2; i++) {
                const int64_t row = r + i;
                const bool real = query + row < job.length;
                const __m512 least = _mm512_set1_ps(real ? normaliser[query + row] : 0);
                const __m512 power = _mm512_fmsub_ps(_mm512_loadu_ps(scores + row * BLOCK + c), factor, least);
                const __m512 p = _mm512_maskz_mov_ps(real ? seen(query + row, key + c) : 0, exp2_of(power));
                const __m512 g = _mm512_sub_ps(_mm512_loadu_ps(grads + row * BLOCK + c), _mm512_set1_ps(s.sums[row]));
                const __m256i narrow = (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(_mm512_mul_ps(p, g), scale));
                _mm256_storeu_si256((__m256i *)&s.slopes[(row * BLOCK + c) / 2], narrow);
                slope[i] = _mm512_cvtepu16_epi32(narrow);
                share[i] = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(p));
            }
            _mm512_storeu_si512(&s.slopes_paired[r / 2 * BLOCK + c], _mm512_or_si512(slope[0], _mm512_slli_epi32(slope[1], 16)));
            _mm512_storeu_si512(&s.shares_paired[r / 2 * BLOCK + c], _mm512_or_si512(share[0], _mm512_slli_epi32(share[1], 16)));
        }
}

AVX512 void backward_block(const moekit_attention &job, Scratch &s, int64_t b, int64_t h, int64_t query) {
    const Rows out = rows_of(job.out, b, h), grad = rows_of(job.grad_out, b, h);
    const float *normaliser = job.normaliser + (b * job.heads + h) * job.length;
    copied(rows_of(job.q, b, h), query, job.length, job.qk_width, s.q.data(), s.qk / 2);
    paired(s.q.data(), s.qk / 2, s.qk, s.q_paired.data(), s.qk);
    copied(grad, query, job.length, job.v_width, s.grad.data(), s.v / 2);
    paired(s.grad.data(), s.v / 2, s.v, s.grad_paired.data(), s.v);
    for (int64_t r = 0; r < BLOCK; r++) {
        s.sums[r] = 0;
        for (int64_t c = 0; query + r < job.length && c < job.v_width; c++)
            s.sums[r] += widened(out[query + r][c]) * widened(grad[query + r][c]);
    }
    for (int64_t key = 0; key <= query; key += BLOCK) {
        float *scores = s.scores.data();
        product({s.q.data(), s.qk / 2, 1}, &s.keys_across[key], s.keys, s.qk / 2, scores, BLOCK, BLOCK, false);
        product({s.grad.data(), s.v / 2, 1}, &s.values[key], s.keys, s.v / 2, scores + BLOCK * BLOCK, BLOCK, BLOCK, false);
        slopes_of(job, s, normaliser, query, key);
        product({s.shares_paired.data(), 1, BLOCK}, s.grad_paired.data(), s.v, BLOCK / 2, &s.grad_v[key * s.v], s.v, s.v, query > key);
        product({s.slopes_paired.data(), 1, BLOCK}, s.q_paired.data(), s.qk, BLOCK / 2, &s.grad_k[key * s.qk], s.qk, s.qk, query > key);
        product({s.slopes.data(), BLOCK / 2, 1}, &s.keys_paired[key / 2 * s.qk], s.qk, BLOCK / 2, s.grad_q.data(), s.qk, s.qk, key > 0);
    }
    rounded(s.grad_q.data(), s.qk, rows_of(job.grad_q, b, h), query, job.length, job.qk_width);
}

AVX512 void backward_head(const moekit_attention &job, Scratch &s, int64_t b, int64_t h) {
    const Rows k = rows_of(job.k, b, h), v = rows_of(job.v, b, h);
    for (int64_t key = 0; key < s.keys; key += BLOCK) {
        copied(k, key, job.length, job.qk_width, s.rows.data(), s.qk / 2);
        transposed(s.rows.data(), s.qk / 2, s.qk / 2, &s.keys_across[key], s.keys);
        paired(s.rows.data(), s.qk / 2, s.qk, &s.keys_paired[key / 2 * s.qk], s.qk);
        copied(v, key, job.length, job.v_width, s.rows.data(), s.v / 2);
        transposed(s.rows.data(), s.v / 2, s.v / 2, &s.values[key], s.keys);
    }
    for (int64_t query = 0; query < job.length; query += BLOCK) backward_block(job, s, b, h, query);
    for (int64_t key = 0; key < job.length; key += BLOCK) {
        rounded(&s.grad_k[key * s.qk], s.qk, rows_of(job.grad_k, b, h), key, job.length, job.qk_width);
        rounded(&s.grad_v[key * s.v], s.v, rows_of(job.grad_v, b, h), key, job.length, job.v_width);
    }
}

}  // namespace

extern "C" {

// out and normaliser of q, k, v. Needs AVX512 with BF16 (level 2).
void moekit_attend(const moekit_attention *job, int threads, int) {
#pragma omp parallel num_threads(threads)
    {
        Scratch scratch(*job, false);
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < job->batch * job->heads; i++) forward_head(*job, scratch, i / job->heads, i % job->heads);
    }
}

// grad_q, grad_k and grad_v of all else.
void moekit_attend_backward(const moekit_attention *job, int threads, int) {
#pragma omp parallel num_threads(threads)
    {
        Scratch scratch(*job, true);
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < job->batch * job->heads; i++) backward_head(*job, scratch, i / job->heads, i % job->heads);
    }
}
}
