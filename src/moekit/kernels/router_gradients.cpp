// The gradients of tokens and centroids where the chosen experts' logits alone have one.

#include "choice.h"
#include "tiles.h"

WIDE_BEGIN

namespace {

using namespace tiles;
using choice::Slopes;

constexpr int AT_ONCE = 8;                   // vectors of a token or centroid that stay in registers
constexpr int64_t SUMMED = AT_ONCE * LANES;  // columns of the centroids' gradient that stay in the second cache

// V vectors, from column d on, of token t's gradient.
template <class Type, int V, class Number>
void of_token(const Slopes &c, int64_t t, const Number *centroids, int64_t width, int64_t d, Number *to) {
    __m512 sum[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) sum[v] = _mm512_setzero_ps();
    for (int64_t place = t * c.top_k; place < (t + 1) * c.top_k; place++) {
        const Number *centroid = centroids + c.experts[place] * width + d;
        const __m512 slope = _mm512_set1_ps(c.slopes[place]);
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) sum[v] = _mm512_fmadd_ps(slope, Type::load(centroid + v * LANES), sum[v]);
    }
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) Type::store(to + t * width + d + v * LANES, sum[v]);
}

// Adds V vectors of token t times its slopes to its experts' sums, which lie SUMMED apart.
template <class Type, int V, class Number> void to_centroids(const Slopes &c, int64_t t, const Number *token, float *sums) {
    __m512 numbers[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) numbers[v] = Type::load(token + v * LANES);
    for (int64_t place = t * c.top_k; place < (t + 1) * c.top_k; place++) {
        float *own = sums + c.experts[place] * SUMMED;
        const __m512 slope = _mm512_set1_ps(c.slopes[place]);
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) _mm512_storeu_ps(own + v * LANES, _mm512_fmadd_ps(slope, numbers[v], _mm512_loadu_ps(own + v * LANES)));
    }
}

template <class Type, class Number>
void gradients(const Slopes &c, const Number *x, const Number *centroids, int64_t width, Number *of_x, Number *of_centroids, int threads) {
#pragma omp parallel num_threads(threads)
    {
        rows::Buffer<float> sums(c.n_experts * SUMMED);
#pragma omp for schedule(static) nowait
        for (int64_t t = 0; t < c.n; t++)
            in_blocks<AT_ONCE>(width, [&](auto v, int64_t d) { of_token<Type, v>(c, t, centroids, width, d, of_x); });
#pragma omp for schedule(dynamic, 1)
        for (int64_t begin = 0; begin < width; begin += SUMMED) {
            const int64_t columns = std::min(SUMMED, width - begin);
            std::fill(sums.begin(), sums.end(), 0.0f);
            for (int64_t t = 0; t < c.n; t++)
                in_blocks<AT_ONCE>(columns, [&](auto v, int64_t d) { to_centroids<Type, v>(c, t, x + t * width + begin + d, sums.data() + d); });
            for (int64_t e = 0; e < c.n_experts; e++)
                for (int64_t d = 0; d < columns; d += LANES) Type::store(of_centroids + e * width + begin + d, _mm512_loadu_ps(sums.data() + e * SUMMED + d));
        }
    }
}

}  // namespace

namespace choice {

void router_gradients(const Slopes &c, const void *x, const void *centroids, int64_t width, int bits, void *of_x, void *of_centroids, int threads) {
    if (bits == 16) gradients<BFloat16>(c, (const uint16_t *)x, (const uint16_t *)centroids, width, (uint16_t *)of_x, (uint16_t *)of_centroids, threads);
    else gradients<Float32>(c, (const float *)x, (const float *)centroids, width, (float *)of_x, (float *)of_centroids, threads);
}

}  // namespace choice

WIDE_END
