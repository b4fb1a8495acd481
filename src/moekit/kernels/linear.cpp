// Products of a few rows with matrices that are read once: the speed of memory is the limit, so each thread reads one
// contiguous stream. Plain C interface; the instruction set is chosen at run time. Many rows go to the tiles.

#include "quantised.h"
#include "side_by_side.h"
#include "stretches.h"

namespace rows {
namespace {

constexpr int64_t LEAST = 16384;       // bytes of a matrix below which a thread takes no part of its own
constexpr int64_t LEAST_HALF = 65536;  // bytes of half a stretch that is read beside the other half

int best_level() {
    __builtin_cpu_init();
    const bool wide = __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
    if (wide && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni")) return 2;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") ? 1 : 0;
}

const Dot *dots(const Matrix &matrix, int level) {
    return matrix.bits == 16 ? bfloat16_dots(matrix, level) : group_dots(matrix, level);
}

// A product of all rows of x. A unit is a stretch of the matrix; `first` is its first among those of all products.
struct Product {
    const Matrix *matrix;
    Some x;
    float *y;
    int64_t unit, first, units;

    const uint8_t *at(int64_t which) const { return matrix->rows + (which - first) * unit * matrix->stride; }
};

// Products in one parallel region, as one stream.
void linear_by_rows(std::vector<Product> &products, int threads, int level) {
    const Product &final = products.back();
    std::atomic<int64_t> taken{0};
    Turns turns(taken, final.first + final.units, threads);
#pragma omp parallel num_threads(threads)
    in_turn(turns, turns.next(), [&](Span span, Span following) {
        const Product *product = products.data();
        for (; span.begin < span.end; product++) {
            const int64_t last = std::min(span.end, product->first + product->units);
            if (span.begin >= last) continue;
            const Matrix &m = *product->matrix;
            const int64_t begin = (span.begin - product->first) * product->unit;
            const int64_t end = std::min((last - product->first) * product->unit, m.out);
            const Product *then = product;
            while (any(following) && following.begin >= then->first + then->units) then++;
            const uint8_t *after = last < span.end ? product[1].at(product[1].first) : any(following) ? then->at(following.begin) : nullptr;
            rows_of(m, level, product->x, begin, end, after, product->y + begin, m.out);
            span.begin = last;
        }
    });
}

// Of `count` rows of a matrix, how many make a half that is read beside the other; 0 where one after the other is as fast.
// So each number of x is fetched once for two rows, and more of memory is on its way: V2-Lite's experts, one token, took 2594
// us and take 2378 where memory is fast, 4021 and 3968 where it is slow (Zen 4). Where the first cache is asked nothing was measured.
int64_t half_of(const Matrix &m, int level, const Some &x, int64_t count) {
    const bool together = in_vectors(m, level) && m.in > SHORT && x.n == 1;
    const int64_t half = count / 2 / TOGETHER * TOGETHER;
    return together && moekit_cache_to_ask() == SECOND && half * m.stride >= LEAST_HALF ? half : 0;
}

// Rows [begin, begin + 2 * half); as rows_of.
void halves_of(const Matrix &m, const Some &x, int64_t begin, int64_t half, const uint8_t *after, float *found) {
    const uint8_t *const from[] = {m.rows + begin * m.stride, m.rows + (begin + half) * m.stride};
    const uint8_t *const then[] = {after, after ? after + AHEAD / 2 : nullptr};
    const uint16_t *row = &x.rows->wide[x.first * m.in];
    side_by_side(m, 2, from, half, AHEAD / 2 / m.stride, after ? then : nullptr, [&](const Beside &beside, int64_t o, int64_t count) {
        float *const to[] = {found + o, found + half + o};
        apart(beside, count, row, to);
    });
}

}  // namespace

void rows_of(const Matrix &m, int level, const Some &x, int64_t begin, int64_t end, const uint8_t *after, float *found,
             int64_t apart) {
    if (const int64_t half = half_of(m, level, x, end - begin)) {
        const int64_t rest = begin + 2 * half;
        halves_of(m, x, begin, half, rest < end ? m.rows + rest * m.stride : after, found);
        found += 2 * half, begin = rest;
    }
    const Dot *dot = dots(m, level);
    const int64_t length = std::max<int64_t>(m.stride, 1), early = AHEAD / length;
    for (int64_t o = begin, stop; o < end; o = stop) {
        // Of a longer row, what lies later in it is asked for, and the beginning of the next.
        const uint8_t *row = m.rows + o * m.stride, *ahead = row + (early ? early * m.stride : AHEAD);
        if (o + early >= end) ahead = after ? after + (o + early - end) * m.stride : row;
        stop = std::min(o + TOGETHER, o + early < end ? end - early : end);
        for (int64_t first = 0; first < x.n; first += MOST) {
            const int64_t n = std::min<int64_t>(MOST, x.n - first);
            dot[n - 1](m, row, stop - o, ahead, *x.rows, x.first + first, found + first * apart + o - begin, apart);
        }
    }
}

}  // namespace rows

using namespace rows;

extern "C" {

int moekit_level() { return best_level(); }

// ys[i][t] = matrices[i] x[t] for n rows of float32. A row is rounded once for neighbours that want it alike.
void moekit_linears(const moekit_matrix *const *matrices, float *const *ys, int64_t count, const float *x, int64_t n,
                    int threads, int level) {
    std::vector<Rows> rounded(count);
    std::vector<Product> products;
    Rows *alike = nullptr;
    for (int64_t i = 0; i < count; i++) {
        const Matrix &m = *matrices[i];
        if (in_tiles(m, n, level)) {
            linear_in_tiles(m, x, n, ys[i], threads);
            continue;
        }
        if (!alike || alike->bits != m.bits || alike->group != (m.bits == 16 ? 0 : m.group)) {
            rounded[i].shape(n, m.in, m.bits, m.group);
            for (int64_t r = 0; r < n; r++) rounded[i].put(r, x + r * m.in, 0, m.in);
            alike = &rounded[i];
        }
        const int64_t unit = rounded_up(std::max<int64_t>(LEAST / std::max<int64_t>(m.stride, 1), 1), 8);
        const int64_t first = products.empty() ? 0 : products.back().first + products.back().units;
        if (m.out) products.push_back({&m, {alike, 0, n}, ys[i], unit, first, rounded_up(m.out, unit) / unit});
    }
    if (!products.empty()) linear_by_rows(products, threads, level);
}

// y[t] = matrix x[t] for n rows of float32.
void moekit_linear(const moekit_matrix *matrix, const float *x, int64_t n, float *y, int threads, int level) {
    moekit_linears(&matrix, &y, 1, x, n, threads, level);
}
}
