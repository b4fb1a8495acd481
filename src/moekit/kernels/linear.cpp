// Products of a few rows with matrices that are read once: the speed of memory is the limit, so each thread reads one
// contiguous stream. Plain C interface; the instruction set is chosen at run time.
//
// A matrix is [out, in], row by row. Its rows are bfloat16, or groups of unsigned 8- or 4-bit numbers with w = scale q + least:
// all numbers of a row (4 bits: byte j of a group holds element j low and element j + group/2 high), then for each group
// its scale and its least value in float16. Rows are `stride` bytes apart.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <immintrin.h>
#include <omp.h>
#include <vector>

namespace {

constexpr int MOST_ROWS = 8;       // rows of x that share one pass over a matrix
constexpr int64_t BLOCK = 8;       // matrix rows read from gate before those of up
constexpr int64_t AHEAD = 2048;    // bytes that are asked for before they are needed

struct Matrix {
    const uint8_t *rows;
    int64_t out, in, stride;
    int32_t bits, group;  // bits: 16 is bfloat16
};

float from_bf16(uint16_t value) {
    uint32_t bits = uint32_t(value) << 16;
    float found;
    std::memcpy(&found, &bits, 4);
    return found;
}

uint16_t to_bf16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t((bits >> 16) | 0x40);
    return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

float from_half(uint16_t half) {
    uint32_t sign = uint32_t(half & 0x8000) << 16, rest = half & 0x7fff, bits;
    if (rest >= 0x7c00) bits = sign | 0x7f800000 | ((rest & 0x3ff) << 13);
    else if (rest >= 0x400) bits = sign | ((rest << 13) + 0x38000000);
    else {
        float small = std::ldexp(float(rest), -24);
        std::memcpy(&bits, &small, 4);
        bits |= sign;
    }
    float found;
    std::memcpy(&found, &bits, 4);
    return found;
}

// Rows of x as a matrix wants them: bfloat16, or 8-bit numbers with a scale and a sum for each group.
struct Rows {
    int64_t n = 0, in = 0, groups = 0;
    int32_t group = 0;
    std::vector<uint16_t> wide;
    std::vector<int8_t> narrow;
    std::vector<float> scale, sum;

    void shape(int64_t n_, int64_t in_, const Matrix &matrix) {
        n = n_, in = in_;
        group = matrix.bits == 16 ? 0 : matrix.group;
        if (!group) {
            wide.resize(n * in);
            return;
        }
        groups = in / group;
        narrow.resize(n * in);
        scale.resize(n * groups);
        sum.resize(n * groups);
    }

    void put(int64_t row, const float *x, int64_t begin, int64_t end) {
        if (!group) {
            for (int64_t i = begin; i < end; i++) wide[row * in + i] = to_bf16(x[i]);
            return;
        }
        for (int64_t g = begin / group; g < end / group; g++) {
            float largest = 0;
            for (int64_t i = g * group; i < (g + 1) * group; i++) largest = std::max(largest, std::fabs(x[i]));
            float step = largest / 127, inverse = step > 0 ? 1 / step : 0;
            int32_t total = 0;
            for (int64_t i = g * group; i < (g + 1) * group; i++) {
                int32_t q = int32_t(std::nearbyint(x[i] * inverse));
                narrow[row * in + i] = int8_t(q);
                total += q;
            }
            scale[row * groups + g] = step;
            sum[row * groups + g] = step * float(total);
        }
    }
};

// ---- one matrix row times up to MOST_ROWS rows of x, plainly ----

void dot_plain(const Matrix &m, const uint8_t *row, const Rows &x, int64_t first, int n, float *found) {
    if (m.bits == 16) {
        for (int r = 0; r < n; r++) {
            float total = 0;
            for (int64_t i = 0; i < m.in; i++) {
                uint16_t w;
                std::memcpy(&w, row + 2 * i, 2);
                total += from_bf16(w) * from_bf16(x.wide[(first + r) * m.in + i]);
            }
            found[r] = total;
        }
        return;
    }
    const int64_t packed = m.in * m.bits / 8, g = m.group;
    for (int r = 0; r < n; r++) {
        float total = 0;
        for (int64_t k = 0; k < m.in / g; k++) {
            const int8_t *q = &x.narrow[(first + r) * m.in + k * g];
            const uint8_t *w = row + k * g * m.bits / 8;
            int32_t product = 0;
            for (int64_t i = 0; i < g; i++) {
                int32_t value = m.bits == 8 ? w[i] : (i < g / 2 ? w[i] & 15 : w[i - g / 2] >> 4);
                product += value * q[i];
            }
            uint16_t both[2];
            std::memcpy(both, row + packed + 4 * k, 4);
            const int64_t at = (first + r) * (m.in / g) + k;
            total += from_half(both[0]) * x.scale[at] * float(product) + from_half(both[1]) * x.sum[at];
        }
        found[r] = total;
    }
}

#define AVX2 __attribute__((target("avx2,fma,f16c")))
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,avx2,fma,f16c")))

AVX2 inline float sum8(__m256 v) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

// ---- AVX2: in must be a multiple of 16 (bfloat16) or group of 32 ----

AVX2 inline __m256 widen8(const void *p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16));
}

template <int N> AVX2 void dot_bf16_avx2(const Matrix &m, const uint8_t *row, const Rows &x, int64_t first, float *found) {
    __m256 total[N][2];
    for (int r = 0; r < N; r++) total[r][0] = total[r][1] = _mm256_setzero_ps();
    const uint16_t *base = &x.wide[first * m.in];
    for (int64_t i = 0; i < m.in; i += 16) {
        _mm_prefetch((const char *)(row + 2 * i + AHEAD), _MM_HINT_T0);
        __m256 low = widen8(row + 2 * i), high = widen8(row + 2 * i + 16);
        for (int r = 0; r < N; r++) {
            total[r][0] = _mm256_fmadd_ps(low, widen8(base + r * m.in + i), total[r][0]);
            total[r][1] = _mm256_fmadd_ps(high, widen8(base + r * m.in + i + 8), total[r][1]);
        }
    }
    for (int r = 0; r < N; r++) found[r] = sum8(_mm256_add_ps(total[r][0], total[r][1]));
}

template <int N> AVX2 void dot_group_avx2(const Matrix &m, const uint8_t *row, const Rows &x, int64_t first, float *found) {
    const int64_t packed = m.in * m.bits / 8, g = m.group, groups = m.in / g;
    __m256 total[N];
    float rest[N];
    for (int r = 0; r < N; r++) total[r] = _mm256_setzero_ps(), rest[r] = 0;
    const __m256i low = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    for (int64_t k = 0; k < groups; k++) {
        uint16_t both[2];
        std::memcpy(both, row + packed + 4 * k, 4);
        const float scale = from_half(both[0]), least = from_half(both[1]);
        const uint8_t *w = row + k * g * m.bits / 8;
        _mm_prefetch((const char *)(w + AHEAD), _MM_HINT_T0);
        __m256i sums[N];
        for (int r = 0; r < N; r++) sums[r] = _mm256_setzero_si256();
        for (int64_t i = 0; i < g; i += 32) {
            __m256i q;
            if (m.bits == 8) q = _mm256_loadu_si256((const __m256i *)(w + i));
            else if (g == 32) {
                __m128i bytes = _mm_loadu_si128((const __m128i *)w);
                q = _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(bytes, 4), bytes), low);
            } else {
                __m256i bytes = _mm256_loadu_si256((const __m256i *)(w + i % (g / 2)));
                q = _mm256_and_si256(i < g / 2 ? bytes : _mm256_srli_epi16(bytes, 4), low);
            }
            for (int r = 0; r < N; r++) {
                __m256i a = _mm256_loadu_si256((const __m256i *)&x.narrow[(first + r) * m.in + k * g + i]);
                if (m.bits == 8) {
                    // maddubs would saturate with numbers up to 255: in 16 bits instead.
                    for (int half = 0; half < 2; half++) {
                        __m128i u = half ? _mm256_extracti128_si256(q, 1) : _mm256_castsi256_si128(q);
                        __m128i s = half ? _mm256_extracti128_si256(a, 1) : _mm256_castsi256_si128(a);
                        sums[r] = _mm256_add_epi32(sums[r], _mm256_madd_epi16(_mm256_cvtepu8_epi16(u), _mm256_cvtepi8_epi16(s)));
                    }
                } else sums[r] = _mm256_add_epi32(sums[r], _mm256_madd_epi16(_mm256_maddubs_epi16(q, a), ones));
            }
        }
        for (int r = 0; r < N; r++) {
            const int64_t at = (first + r) * groups + k;
            total[r] = _mm256_fmadd_ps(_mm256_set1_ps(scale * x.scale[at]), _mm256_cvtepi32_ps(sums[r]), total[r]);
            rest[r] += least * x.sum[at];
        }
    }
    for (int r = 0; r < N; r++) found[r] = sum8(total[r]) + rest[r];
}

// ---- AVX512 with BF16 and VNNI: in must be a multiple of 32 ----

template <int N> AVX512 void dot_bf16_avx512(const Matrix &m, const uint8_t *row, const Rows &x, int64_t first, float *found) {
    // With one row of x, several sums hide the latency of the products.
    constexpr int CHAINS = N == 1 ? 4 : N == 2 ? 2 : 1;
    __m512 total[N][CHAINS];
    for (int r = 0; r < N; r++)
        for (int c = 0; c < CHAINS; c++) total[r][c] = _mm512_setzero_ps();
    const uint16_t *base = &x.wide[first * m.in];
    int64_t i = 0;
    for (; i + 32 * CHAINS <= m.in; i += 32 * CHAINS)
        for (int c = 0; c < CHAINS; c++) {
            const int64_t at = i + 32 * c;
            _mm_prefetch((const char *)(row + 2 * at + AHEAD), _MM_HINT_T0);
            __m512bh w = (__m512bh)_mm512_loadu_si512(row + 2 * at);
            for (int r = 0; r < N; r++)
                total[r][c] = _mm512_dpbf16_ps(total[r][c], w, (__m512bh)_mm512_loadu_si512(base + r * m.in + at));
        }
    for (; i < m.in; i += 32) {
        __m512bh w = (__m512bh)_mm512_loadu_si512(row + 2 * i);
        for (int r = 0; r < N; r++)
            total[r][0] = _mm512_dpbf16_ps(total[r][0], w, (__m512bh)_mm512_loadu_si512(base + r * m.in + i));
    }
    for (int r = 0; r < N; r++) {
        for (int c = 1; c < CHAINS; c++) total[r][0] = _mm512_add_ps(total[r][0], total[r][c]);
        found[r] = _mm512_reduce_add_ps(total[r][0]);
    }
}

template <int N> AVX512 void dot_group_avx512(const Matrix &m, const uint8_t *row, const Rows &x, int64_t first, float *found) {
    const int64_t packed = m.in * m.bits / 8, g = m.group, groups = m.in / g;
    const __m512i low = _mm512_set1_epi8(15);
    __m512 total[N];
    float rest[N];
    for (int r = 0; r < N; r++) total[r] = _mm512_setzero_ps(), rest[r] = 0;
    // 64 numbers at a time: two groups of 32, one of 64, half of one of 128.
    for (int64_t i = 0; i < m.in; i += 64) {
        __m512i q;
        const uint8_t *w = row + (i / g) * g * m.bits / 8;
        if (m.bits == 8) {
            q = _mm512_loadu_si512(row + i);
            _mm_prefetch((const char *)(row + i + AHEAD), _MM_HINT_T0);
        } else if (g == 32) {
            __m256i bytes = _mm256_loadu_si256((const __m256i *)w);
            __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(bytes), _mm256_srli_epi16(bytes, 4), 1);
            // Groups lie as low 0, low 1, high 0, high 1: each low beside its high.
            q = _mm512_and_si512(_mm512_shuffle_i64x2(both, both, 0xd8), low);
            if (i % 128 == 0) _mm_prefetch((const char *)(w + AHEAD), _MM_HINT_T0);
        } else if (g == 64) {
            __m256i bytes = _mm256_loadu_si256((const __m256i *)w);
            q = _mm512_and_si512(_mm512_inserti64x4(_mm512_castsi256_si512(bytes), _mm256_srli_epi16(bytes, 4), 1), low);
            if (i % 128 == 0) _mm_prefetch((const char *)(w + AHEAD), _MM_HINT_T0);
        } else {
            const int64_t inside = i % g, byte = inside % (g / 2);
            __m512i bytes = _mm512_loadu_si512(w + byte);
            q = _mm512_and_si512(inside < g / 2 ? bytes : _mm512_srli_epi16(bytes, 4), low);
            if (inside < g / 2) _mm_prefetch((const char *)(w + byte + AHEAD), _MM_HINT_T0);
        }
        const int64_t k = i / g;
        uint16_t both[4];
        std::memcpy(both, row + packed + 4 * k, g == 32 ? 8 : 4);
        const float scale = _cvtsh_ss(both[0]), least = _cvtsh_ss(both[1]);
        for (int r = 0; r < N; r++) {
            const int64_t at = (first + r) * groups + k;
            __m512i a = _mm512_loadu_si512(&x.narrow[(first + r) * m.in + i]);
            __m512 product = _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(_mm512_setzero_si512(), q, a));
            if (g == 32) {
                const float scale2 = _cvtsh_ss(both[2]), least2 = _cvtsh_ss(both[3]);
                __m512 factor = _mm512_insertf32x8(_mm512_set1_ps(scale * x.scale[at]), _mm256_set1_ps(scale2 * x.scale[at + 1]), 1);
                total[r] = _mm512_fmadd_ps(factor, product, total[r]);
                rest[r] += least * x.sum[at] + least2 * x.sum[at + 1];
            } else {
                total[r] = _mm512_fmadd_ps(_mm512_set1_ps(scale * x.scale[at]), product, total[r]);
                if (i % g == 0) rest[r] += least * x.sum[at];
            }
        }
    }
    for (int r = 0; r < N; r++) found[r] = _mm512_reduce_add_ps(total[r]) + rest[r];
}

using Dot = void (*)(const Matrix &, const uint8_t *, const Rows &, int64_t, float *);

template <int N> void dot_plain_n(const Matrix &m, const uint8_t *row, const Rows &x, int64_t first, float *found) {
    dot_plain(m, row, x, first, N, found);
}

#define EACH(name) {name<1>, name<2>, name<3>, name<4>, name<5>, name<6>, name<7>, name<8>}
const Dot PLAIN[] = EACH(dot_plain_n), WIDE2[] = EACH(dot_bf16_avx2), GROUP2[] = EACH(dot_group_avx2);
const Dot WIDE5[] = EACH(dot_bf16_avx512), GROUP5[] = EACH(dot_group_avx512);

int best_level() {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw")) return 2;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") ? 1 : 0;
}

const Dot *dots(const Matrix &m, int level) {
    const bool wide = m.bits == 16;
    if (level >= 2 && m.in % (wide ? 32 : 64) == 0 && (wide || m.group <= 64 || m.group % 128 == 0)) return wide ? WIDE5 : GROUP5;
    if (level >= 1 && m.in % 16 == 0 && (wide || m.group == 32 || m.group % 64 == 0)) return wide ? WIDE2 : GROUP2;
    return PLAIN;
}

// Rows [begin, end) of the matrix with all rows of x; `found` [out, n] keeps matrix rows together.
void rows_of(const Matrix &m, const Dot *dot, const Rows &x, int64_t begin, int64_t end, float *found) {
    for (int64_t o = begin; o < end; o++)
        for (int64_t first = 0; first < x.n; first += MOST_ROWS) {
            const int64_t n = std::min<int64_t>(MOST_ROWS, x.n - first);
            dot[n - 1](m, m.rows + o * m.stride, x, first, found + o * x.n + first);
        }
}

struct Span { int64_t begin, end; };

Span share(int64_t total, int64_t unit) {
    const int64_t units = (total + unit - 1) / unit, n = omp_get_num_threads(), t = omp_get_thread_num();
    return {std::min(units * t / n * unit, total), std::min(units * (t + 1) / n * unit, total)};
}

}  // namespace

extern "C" {

struct moekit_matrix {
    const uint8_t *rows;
    int64_t out, in, stride;
    int32_t bits, group;
};

// One SwiGLU block and those rows of x that come to it.
struct moekit_block {
    moekit_matrix gate_up, down;
    const int64_t *tokens;   // which row of x each of its rows is
    const float *weights;    // the factor of each
    int64_t n_rows;
};

int moekit_level() { return best_level(); }

// y[t] = matrix x[t] for n rows of float32.
void moekit_linear(const moekit_matrix *matrix, const float *x, int64_t n, float *y, int threads, int level) {
    const Matrix m{matrix->rows, matrix->out, matrix->in, matrix->stride, matrix->bits, matrix->group};
    const Dot *dot = dots(m, level);
    Rows rows;
    rows.shape(n, m.in, m);
    for (int64_t r = 0; r < n; r++) rows.put(r, x + r * m.in, 0, m.in);
    std::vector<float> found(m.out * n);
#pragma omp parallel num_threads(threads)
    {
        const Span span = share(m.out, BLOCK);
        rows_of(m, dot, rows, span.begin, span.end, found.data());
        for (int64_t o = span.begin; o < span.end; o++)
            for (int64_t r = 0; r < n; r++) y[r * m.out + o] = found[o * n + r];
    }
}

// y[t] += sum over the blocks that t comes to of weight * down (silu(gate x[t]) * up x[t]), in one parallel region.
void moekit_swiglu(const moekit_block *blocks, int64_t n_blocks, const float *x, int64_t width, float *y, int threads, int level) {
    struct Work {
        Matrix gate, up, down;
        const Dot *first, *second;
        Rows x, inner;
        std::vector<float> gates, ups, outs;
        int64_t start;
    };
    std::vector<Work> works(n_blocks);
    int64_t total = 0;
    for (int64_t b = 0; b < n_blocks; b++) {
        const moekit_block &block = blocks[b];
        const moekit_matrix &g = block.gate_up, &d = block.down;
        const int64_t inner = g.out / 2, n = block.n_rows;
        Work &work = works[b];
        work.gate = {g.rows, inner, g.in, g.stride, g.bits, g.group};
        work.up = {g.rows + inner * g.stride, inner, g.in, g.stride, g.bits, g.group};
        work.down = {d.rows, d.out, d.in, d.stride, d.bits, d.group};
        work.first = dots(work.gate, level), work.second = dots(work.down, level);
        work.x.shape(n, g.in, work.gate);
        for (int64_t r = 0; r < n; r++) work.x.put(r, x + block.tokens[r] * width, 0, width);
        work.inner.shape(n, inner, work.down);
        work.gates.resize(inner * n), work.ups.resize(inner * n), work.outs.resize(d.out * n);
        work.start = total;
        total += inner;
    }
#pragma omp parallel num_threads(threads)
    {
        const Span span = share(total, BLOCK);
        for (Work &work : works) {
            const int64_t begin = std::max<int64_t>(span.begin - work.start, 0);
            const int64_t end = std::min(span.end - work.start, work.gate.out);
            for (int64_t o = begin; o < end; o += BLOCK) {
                const int64_t stop = std::min(o + BLOCK, end);
                rows_of(work.gate, work.first, work.x, o, stop, work.gates.data());
                rows_of(work.up, work.first, work.x, o, stop, work.ups.data());
            }
        }
#pragma omp barrier
#pragma omp for schedule(dynamic, 1)
        for (int64_t b = 0; b < n_blocks; b++) {
            Work &work = works[b];
            const int64_t n = work.x.n, inner = work.gate.out;
            std::vector<float> row(inner);
            for (int64_t r = 0; r < n; r++) {
                for (int64_t o = 0; o < inner; o++) {
                    const float gate = work.gates[o * n + r];
                    row[o] = gate / (1 + std::exp(-gate)) * work.ups[o * n + r];
                }
                work.inner.put(r, row.data(), 0, inner);
            }
        }
        const Span columns = share(width, BLOCK);
        for (int64_t b = 0; b < n_blocks; b++) {
            Work &work = works[b];
            const int64_t n = work.x.n;
            rows_of(work.down, work.second, work.inner, columns.begin, columns.end, work.outs.data());
            for (int64_t o = columns.begin; o < columns.end; o++)
                for (int64_t r = 0; r < n; r++)
                    y[blocks[b].tokens[r] * width + o] += blocks[b].weights[r] * work.outs[o * n + r];
        }
    }
}
}
