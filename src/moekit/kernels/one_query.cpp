// Attention of one new token of each sequence over what a cache remembers: turns, appends and attends in one call. The past
// is read once, in tiles that the query heads of a group share; the softmax is online (arXiv 1805.02867), and where there are
// too few heads for the threads, each takes a part of the past (flash-decoding).

#include <immintrin.h>
#include <memory>
#include <vector>

#include "loops.h"
#include "one_query.h"

namespace {

using Job = moekit_query;

constexpr int64_t TILE = 64;         // tokens whose keys and values stay in the first cache while all heads use them
constexpr int64_t LEAST = 32;        // tokens of the past that are worth a part of their own
constexpr int64_t ALONE = 64 << 10;  // bytes of the past below which one thread is done before another has begun

// found[j] = q . key j
template <typename Number>
INLINE void scores(const Number *__restrict q, const Number *keys, int64_t step, int64_t n, int64_t width, float *found) {
    for (int64_t j = 0; j < n; j++) {
        const Number *__restrict key = keys + j * step;
        found[j] = sum_of(width, [&](int64_t i) { return widened(q[i]) * widened(key[i]); });
    }
}

// sum += weights[j] * value j
template <typename Number>
INLINE void add(const Number *values, int64_t step, int64_t n, const float *weights, int64_t width, float *__restrict sum) {
    for (int64_t j = 0; j < n; j++) {
        const Number *__restrict value = values + j * step;
        for (int64_t i = 0; i < width; i++) sum[i] += weights[j] * widened(value[i]);
    }
}

// Each score s becomes 2^(factor s - most); returns their sum.
INLINE float exponentials(float *scores, int64_t n, float factor, float most) {
    for (int64_t j = 0; j < n; j++) scores[j] = power_of_2(scores[j] * factor - most);
    return sum_of(n, [&](int64_t j) { return scores[j]; });
}

// The same loops, once for each instruction set.
template <typename Number> struct Loops {
    void (*scores)(const Number *, const Number *, int64_t, int64_t, int64_t, float *);
    void (*add)(const Number *, int64_t, int64_t, const float *, int64_t, float *);
    float (*exponentials)(float *, int64_t, float, float);
};

#define FOR_LEVEL(level, target) \
    template <typename Number> \
    target void scores##level(const Number *q, const Number *keys, int64_t step, int64_t n, int64_t width, float *found) { \
        scores(q, keys, step, n, width, found); \
    } \
    template <typename Number> \
    target void add##level(const Number *values, int64_t step, int64_t n, const float *weights, int64_t width, float *sum) { \
        add(values, step, n, weights, width, sum); \
    } \
    target float exponentials##level(float *scores, int64_t n, float factor, float most) { \
        return exponentials(scores, n, factor, most); \
    } \
    template <typename Number> constexpr Loops<Number> LOOPS##level = {scores##level<Number>, add##level<Number>, exponentials##level};

FOR_LEVEL(0, )
FOR_LEVEL(1, AT_LEVEL_1)
FOR_LEVEL(2, AT_LEVEL_2)

#define AVX512_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma")))

// N keys side by side hide the latency of the products. width must be a multiple of 32.
template <int N>
AVX512_BF16 void scores_of(const uint16_t *q, const uint16_t *keys, int64_t step, int64_t width, float *found) {
    __m512 total[N];
    for (int j = 0; j < N; j++) total[j] = _mm512_setzero_ps();
    for (int64_t i = 0; i < width; i += 32) {
        const __m512bh part = (__m512bh)_mm512_loadu_si512(q + i);
        for (int j = 0; j < N; j++)
            total[j] = _mm512_dpbf16_ps(total[j], part, (__m512bh)_mm512_loadu_si512(keys + j * step + i));
    }
    for (int j = 0; j < N; j++) found[j] = _mm512_reduce_add_ps(total[j]);
}

void scores_bf16(const uint16_t *q, const uint16_t *keys, int64_t step, int64_t n, int64_t width, float *found) {
    int64_t j = 0;
    for (; j + 8 <= n; j += 8) scores_of<8>(q, keys + j * step, step, width, found + j);
    for (; j < n; j++) scores_of<1>(q, keys + j * step, step, width, found + j);
}

// V vectors of 16 columns stay in registers over all values.
template <int V>
AVX512_BF16 void add_columns(const uint16_t *values, int64_t step, int64_t n, const float *weights, float *sum) {
    __m512 total[V];
    for (int v = 0; v < V; v++) total[v] = _mm512_loadu_ps(sum + 16 * v);
    for (int64_t j = 0; j < n; j++) {
        const __m512 weight = _mm512_set1_ps(weights[j]);
        for (int v = 0; v < V; v++) {
            const __m256i value = _mm256_loadu_si256((const __m256i *)(values + j * step + 16 * v));
            const __m512 wide = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(value), 16));
            total[v] = _mm512_fmadd_ps(weight, wide, total[v]);
        }
    }
    for (int v = 0; v < V; v++) _mm512_storeu_ps(sum + 16 * v, total[v]);
}

// width must be a multiple of 16.
void add_bf16(const uint16_t *values, int64_t step, int64_t n, const float *weights, int64_t width, float *sum) {
    int64_t i = 0;
    for (; i + 128 <= width; i += 128) add_columns<8>(values + i, step, n, weights, sum + i);
    for (; i < width; i += 16) add_columns<1>(values + i, step, n, weights, sum + i);
}

const Loops<uint16_t> BF16 = {scores_bf16, add_bf16, exponentials2};

Loops<float> loops_for(const Job &, int level, float) {
    return level >= 2 ? LOOPS2<float> : level == 1 ? LOOPS1<float> : LOOPS0<float>;
}

Loops<uint16_t> loops_for(const Job &job, int level, uint16_t) {
    if (level >= 2 && job.width % 32 == 0 && job.v_width % 16 == 0) return BF16;
    return level >= 2 ? LOOPS2<uint16_t> : level == 1 ? LOOPS1<uint16_t> : LOOPS0<uint16_t>;
}

// A query or key as the past holds it: turned by its position's angles, in half order whatever the layout was.
template <typename New, typename Number> void turn(const Job &job, int64_t sequence, const New *from, Number *to) {
    const int64_t still = job.width - 2 * job.half, near = job.interleaved ? 2 : 1, far = job.interleaved ? 1 : job.half;
    const float *cos = job.cos + sequence * job.turn_step, *sin = job.sin + sequence * job.turn_step;
    for (int64_t i = 0; i < still; i++) narrow_to(to + i, widened(from[i]));
    for (int64_t i = 0; i < job.half; i++) {
        const float first = widened(from[still + near * i]), second = widened(from[still + near * i + far]);
        narrow_to(to + still + i, first * cos[i] - second * sin[i]);
        narrow_to(to + still + job.half + i, second * cos[i] + first * sin[i]);
    }
}

// One key head of one sequence.
template <typename New, typename Number> struct Head {
    int64_t sequence, group, v_step;
    const New *q, *k, *v;
    Number *keys, *values;

    Head(const Job &job, int64_t unit) : sequence(unit / job.kv_heads), group(job.heads / job.kv_heads) {
        v_step = job.values ? job.v_width : job.width;
        q = (const New *)job.q + unit * group * job.width, k = (const New *)job.k + unit * job.width;
        v = job.values ? (const New *)job.v + unit * job.v_width : nullptr;
        keys = (Number *)job.keys + unit * job.capacity * job.width;
        values = job.values ? (Number *)job.values + unit * job.capacity * job.v_width : keys;
    }
};

// What one query has seen of its past: the greatest score (times log2 e), the sum of exponentials, the weighted values.
struct Seen {
    float *most, *total, *sum;
    Seen(float *at) : most(at), total(at + 1), sum(at + 2) {}
    static int64_t size(const Job &job) { return job.v_width + 2; }
};

// The queries of a key head over tokens [begin, end), of which the newest is written first.
template <typename New, typename Number>
void see(const Job &job, const Loops<Number> &loops, int64_t unit, int64_t begin, int64_t end, float *found) {
    const Head<New, Number> head(job, unit);
    if (end > job.past) {
        turn(job, head.sequence, head.k, head.keys + job.past * job.width);
        for (int64_t i = 0; head.v && i < job.v_width; i++) narrow_to(head.values + job.past * job.v_width + i, widened(head.v[i]));
    }
    std::vector<Number> queries(head.group * job.width);
    for (int64_t h = 0; h < head.group; h++) {
        turn(job, head.sequence, head.q + h * job.width, &queries[h * job.width]);
        std::fill_n(found + h * Seen::size(job), Seen::size(job), 0.0f);
        *Seen(found + h * Seen::size(job)).most = -INFINITY;
    }
    float weights[TILE];
    const float factor = job.scale * LOG2_E;
    for (int64_t first = begin; first < end; first += TILE) {
        const int64_t n = std::min(TILE, end - first);
        for (int64_t h = 0; h < head.group; h++) {
            const Seen seen(found + h * Seen::size(job));
            loops.scores(&queries[h * job.width], head.keys + first * job.width, job.width, n, job.width, weights);
            float most = *seen.most;
            for (int64_t j = 0; j < n; j++) most = std::max(most, weights[j] * factor);
            if (most > *seen.most && first > begin) {
                const float shrunk = std::exp2(*seen.most - most);
                *seen.total *= shrunk;
                for (int64_t i = 0; i < job.v_width; i++) seen.sum[i] *= shrunk;
            }
            *seen.most = most;
            *seen.total += loops.exponentials(weights, n, factor, most);
            loops.add(head.values + first * head.v_step, head.v_step, n, weights, job.v_width, seen.sum);
        }
    }
}

// One query's output from what it has seen in each part of its past, `step` numbers apart.
template <typename New> void join(const Job &job, float *parts, int64_t n_parts, int64_t step, New *out) {
    float most = -INFINITY, total = 0;
    for (int64_t p = 0; p < n_parts; p++) most = std::max(most, *Seen(parts + p * step).most);
    for (int64_t p = 0; p < n_parts; p++) {
        const Seen seen(parts + p * step), first(parts);
        const float share = n_parts == 1 ? 1 : std::exp2(*seen.most - most);
        total += share * *seen.total;
        for (int64_t i = 0; i < job.v_width; i++) first.sum[i] = share * seen.sum[i] + (p ? first.sum[i] : 0);
    }
    for (int64_t i = 0; i < job.v_width; i++) narrow_to(out + i, Seen(parts).sum[i] / total);
}

template <typename New, typename Number> void attend(const Job &job, int threads, int level) {
    const int64_t units = job.batch * job.kv_heads, group = job.heads / job.kv_heads, tokens = job.past + 1;
    if (units * tokens * (job.width + job.v_width) * int64_t(sizeof(Number)) < ALONE) threads = 1;
    const int64_t parts = units % threads == 0 ? 1 : std::min<int64_t>(threads, (tokens + LEAST - 1) / LEAST);
    const int64_t size = Seen::size(job);
    const Loops<Number> loops = loops_for(job, level, Number());
    const std::unique_ptr<float[]> seen(new float[units * parts * group * size]);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t task = 0; task < units * parts; task++) {
            const int64_t part = task % parts;
            see<New>(job, loops, task / parts, tokens * part / parts, tokens * (part + 1) / parts, &seen[task * group * size]);
        }
#pragma omp for schedule(static)
        for (int64_t query = 0; query < job.batch * job.heads; query++) {
            float *at = &seen[(query / group * parts * group + query % group) * size];
            join(job, at, parts, group * size, (New *)job.out + query * job.v_width);
        }
    }
}

}  // namespace

extern "C" {

// Writes the new keys and values into the past, and out = softmax(scale q K^T) V over all of it.
void moekit_one_query(const moekit_query *job, int threads, int level) {
    if (job->narrow) return (job->narrow_new ? attend<uint16_t, uint16_t> : attend<float, uint16_t>)(*job, threads, level);
    return (job->narrow_new ? attend<uint16_t, float> : attend<float, float>)(*job, threads, level);
}
}
