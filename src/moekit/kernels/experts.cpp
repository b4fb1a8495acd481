// The expert block of a mixture of experts, forward and backward, for many tokens: y[t] = sum over its experts of
// w down (silu(gate x[t]) * up x[t]). Each product is one pass of tiles over a matrix where it lies; what comes between the
// products is done while a tile is in the cache. Hidden values are kept as [row of the matrix][token], expert by expert, the
// tokens of each filled up to whole vectors with zeros.

#include <malloc.h>
#include <memory>
#include <omp.h>
#include <vector>

#include "tiles.h"

extern "C" {

// The rows of a routing, sorted by expert, and the experts' matrices: [2 inner, width] (gate, then up) and [width, inner].
struct moekit_experts {
    const void *const *gate_up, *const *down;  // one address for each expert
    const int64_t *bounds;                     // rows bounds[e] to bounds[e + 1] are for expert e
    const int64_t *tokens;                     // whose row it is
    const int64_t *places;                     // the rows of each token, [n_tokens, top_k]; the number of rows: none
    const float *weights;                      // of each row
    const int64_t *groups;                     // experts groups[g] to groups[g + 1] are computed before the next ones
    void *const *hidden, *const *inners;       // room for each expert's gate and up, and for half as much; or null
    int64_t n_experts, n_groups, n_tokens, top_k, width, inner;
    int32_t bits, threads;
};
}

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma")
#endif

namespace {

using namespace tiles;

constexpr int64_t PACKED = 3 << 18;  // bytes of packed columns that stay in a core's second cache

// Rows of an expert that are computed together: their columns are packed once and meet every strip of its matrices.
struct Chunk { int64_t expert, begin, n; };

struct Scratch {
    std::unique_ptr<Word[]> room;
    int64_t size = 0;
    template <class T> T *take(int64_t bytes) {
        if (bytes > size) room.reset(new Word[bytes / 4 + 16]), size = bytes;
        return (T *)room.get();
    }
};

template <class Type> struct Block {
    using Number = typename Type::Number;
    const moekit_experts &e;
    std::vector<std::vector<Chunk>> chunks;  // of each group

    // `widest` is the longest inner dimension of the products with packed columns.
    Block(const moekit_experts &experts, int64_t widest) : e(experts), chunks(experts.n_groups) {
        const int64_t room = std::max<int64_t>(COLUMNS, PACKED / (4 * words(widest)) / COLUMNS * COLUMNS);
        for (int64_t g = 0; g < e.n_groups; g++) {
            for (int64_t i = e.groups[g]; i < e.groups[g + 1]; i++) {
                const int64_t n = e.bounds[i + 1] - e.bounds[i];
                const bool few = e.groups[g + 1] - e.groups[g] < 4 * e.threads;
                const int64_t size = n ? chunk_size(n, room, few ? e.threads : 1) : 1;
                for (int64_t begin = 0; begin < n; begin += size) chunks[g].push_back({i, begin, std::min(size, n - begin)});
            }
            // The longest first, so that threads end together.
            std::stable_sort(chunks[g].begin(), chunks[g].end(), [](const Chunk &a, const Chunk &b) { return a.n > b.n; });
        }
    }

    // At most `room` rows, so that as many threads as there are for `n` rows end together. Chunks begin at whole vectors:
    // each writes its last one whole.
    static int64_t chunk_size(int64_t n, int64_t room, int64_t threads) {
        const int64_t least = (n + room - 1) / room;
        int64_t found = 0, shortest = INT64_MAX;
        for (int64_t pieces = least; pieces < least + 4 * threads; pieces++) {
            const int64_t size = up_to((n + pieces - 1) / pieces, LANES), count = (n + size - 1) / size;
            const int64_t longest = up_to(count, threads) / threads * size;
            if (longest < shortest && (size >= COLUMNS || pieces == least)) found = size, shortest = longest;
        }
        return found;
    }

    static int64_t words(int64_t n) { return n / Type::PER_WORD; }
    static int64_t packed(int64_t inner, int64_t columns) { return 4 * words(inner) * up_to(columns, COLUMNS); }
    static int vectors(int64_t columns) { return int(std::min<int64_t>(VECTORS, (columns + LANES - 1) / LANES)); }
    const Number *gate_up(int64_t i) const { return (const Number *)e.gate_up[i]; }
    const Number *down(int64_t i) const { return (const Number *)e.down[i]; }
    int64_t padded(int64_t i) const { return up_to(e.bounds[i + 1] - e.bounds[i], LANES); }

    // silu(gate) * up of a strip and a panel, into the panel of the second product; gate and up are kept if wanted.
    void activate(const float *gate, const float *up, int64_t row, int used, Word *panel, Number *kept, int64_t stride) const {
        for (int r = 0; r < STRIP; r += Type::PER_WORD)
            for (int v = 0; v < used; v++) {
                __m512 inner[2];
                for (int i = 0; i < Type::PER_WORD; i++) {
                    const int64_t at = (r + i) * COLUMNS + v * LANES;
                    const __m512 g = _mm512_loadu_ps(gate + at), u = _mm512_loadu_ps(up + at);
                    inner[i] = _mm512_mul_ps(_mm512_mul_ps(g, sigmoid(g)), u);
                    if (!kept) continue;
                    Type::store(kept + (row + r + i) * stride + v * LANES, g);
                    Type::store(kept + (e.inner + row + r + i) * stride + v * LANES, u);
                }
                _mm512_storeu_si512(panel + words(row + r) * COLUMNS + v * LANES, Type::words(inner[0], inner[Type::PER_WORD - 1]));
            }
    }

    void forward_chunk(const Chunk &c, const Number *x, Number *rows, Scratch &one, Scratch &two) const {
        const int64_t width = words(e.width), inner = words(e.inner), begin = e.bounds[c.expert] + c.begin, stride = padded(c.expert);
        Word *in = one.take<Word>(packed(e.width, c.n)), *between = two.take<Word>(packed(e.inner, c.n));
        Number *kept = e.hidden ? (Number *)e.hidden[c.expert] + c.begin : nullptr;
        pack_rows(x, e.width, e.tokens + begin, c.n, width, in);
        Found gate, up;
        for (int64_t i = 0; i < e.inner; i += STRIP)
            for (int64_t p = 0; p < c.n; p += COLUMNS) {
                const int used = vectors(c.n - p);
                const Number *matrix = gate_up(c.expert) + i * e.width;
                strip<Type>(matrix, e.width, in + p * width, width, c.n - p, gate);
                strip<Type>(matrix + e.inner * e.width, e.width, in + p * width, width, c.n - p, up);
                activate(gate, up, i, used, between + p * inner, kept ? kept + p : nullptr, stride);
            }
        for (int64_t d = 0; d < e.width; d += STRIP)
            for (int64_t p = 0; p < c.n; p += COLUMNS) {
                strip<Type>(down(c.expert) + d * e.inner, e.inner, between + p * inner, inner, c.n - p, gate);
                put_columns<Type>(gate, std::min<int64_t>(COLUMNS, c.n - p), rows + (begin + p) * e.width + d, e.width);
            }
    }

    // The gradients of gate and up from that of silu(gate) * up, for a strip and a panel, in place of gate and up.
    void slopes(const float *grad, int64_t row, int used, Number *kept, Number *inner_out, int64_t stride, const float *weights, float *of_weights, Word *panel) const {
        const __m512 one = _mm512_set1_ps(1);
        for (int v = 0; v < used; v++) {
            const __m512 w = _mm512_loadu_ps(weights + v * LANES);
            __m512 sum = _mm512_loadu_ps(of_weights + v * LANES);
            for (int r = 0; r < STRIP; r += Type::PER_WORD) {
                __m512 of_gate[2], of_up[2];
                for (int i = 0; i < Type::PER_WORD; i++) {
                    const int64_t at = (row + r + i) * stride + v * LANES, half = e.inner * stride;
                    const __m512 g = Type::load(kept + at), u = Type::load(kept + half + at), s = sigmoid(g), silu = _mm512_mul_ps(g, s);
                    const __m512 inner = _mm512_mul_ps(silu, u), raw = _mm512_loadu_ps(grad + (r + i) * COLUMNS + v * LANES);
                    sum = _mm512_fmadd_ps(raw, inner, sum);
                    const __m512 slope_inner = _mm512_mul_ps(raw, w);
                    of_up[i] = _mm512_mul_ps(slope_inner, silu);
                    // d silu / d g = s (1 + g (1 - s))
                    of_gate[i] = _mm512_mul_ps(_mm512_mul_ps(slope_inner, u), _mm512_mul_ps(s, _mm512_fmadd_ps(g, _mm512_sub_ps(one, s), one)));
                    Type::store(kept + at, of_gate[i]);
                    Type::store(kept + half + at, of_up[i]);
                    Type::store(inner_out + at, _mm512_mul_ps(inner, w));
                }
                _mm512_storeu_si512(panel + words(row + r) * COLUMNS + v * LANES, Type::words(of_gate[0], of_gate[Type::PER_WORD - 1]));
                _mm512_storeu_si512(panel + words(e.inner + row + r) * COLUMNS + v * LANES, Type::words(of_up[0], of_up[Type::PER_WORD - 1]));
            }
            _mm512_storeu_ps(of_weights + v * LANES, sum);
        }
    }

    // From the gradient of the tokens: of the rows' weights, of gate and up (in their place), of the rows of x; inners
    // become the weighted silu(gate) * up.
    void backward_chunk(const Chunk &c, const Number *grad, Number *rows, float *of_weights, Scratch &one, Scratch &two, Scratch &three) const {
        const int64_t width = words(e.width), both = words(2 * e.inner), begin = e.bounds[c.expert] + c.begin, stride = padded(c.expert);
        const int64_t columns = up_to(c.n, LANES);
        Word *in = one.take<Word>(packed(e.width, c.n)), *between = two.take<Word>(packed(2 * e.inner, c.n));
        float *weights = three.take<float>(8 * columns + sizeof(Number) * STRIP * std::max(e.width, 2 * e.inner)), *sums = weights + columns;
        Number *turned = (Number *)(sums + columns);
        for (int64_t r = 0; r < columns; r++) weights[r] = r < c.n ? e.weights[begin + r] : 0, sums[r] = 0;
        pack_rows(grad, e.width, e.tokens + begin, c.n, width, in);
        Number *hidden = (Number *)e.hidden[c.expert] + c.begin, *inners = (Number *)e.inners[c.expert] + c.begin;
        Found found;
        for (int64_t i = 0; i < e.inner; i += STRIP) {
            turn_columns<Type>(down(c.expert) + i, e.inner, e.width, turned, e.width);
            for (int64_t p = 0; p < c.n; p += COLUMNS) {
                const int used = vectors(c.n - p);
                strip<Type>(turned, e.width, in + p * width, width, c.n - p, found);
                slopes(found, i, used, hidden + p, inners + p, stride, weights + p, sums + p, between + p * both);
            }
        }
        std::copy(sums, sums + c.n, of_weights + begin);
        for (int64_t d = 0; d < e.width; d += STRIP) {
            turn_columns<Type>(gate_up(c.expert) + d, e.width, 2 * e.inner, turned, 2 * e.inner);
            for (int64_t p = 0; p < c.n; p += COLUMNS) {
                strip<Type>(turned, 2 * e.inner, between + p * both, both, c.n - p, found);
                put_columns<Type>(found, std::min<int64_t>(COLUMNS, c.n - p), rows + (begin + p) * e.width + d, e.width);
            }
        }
    }

    // Columns [from, from + n) of the gradients of an expert's matrices: sums over its rows of x and of the tokens' gradients.
    void matrix_columns(int64_t i, int64_t from, int64_t n, const Number *x, const Number *grad, Number *of_gate_up, Number *of_down, Scratch &one) const {
        const int64_t rows = e.bounds[i + 1] - e.bounds[i], stride = padded(i), inner = words(up_to(rows, Type::PER_WORD));
        const int64_t *tokens = e.tokens + e.bounds[i];
        Word *in = one.take<Word>(4 * inner * up_to(n, COLUMNS));
        const Number *slopes = (const Number *)e.hidden[i], *inners = (const Number *)e.inners[i];
        of_gate_up += 2 * i * e.inner * e.width, of_down += i * e.inner * e.width;
        Found found;
        pack_columns<Type>(x, e.width, tokens, rows, from, n, in);
        for (int64_t r = 0; r < 2 * e.inner; r += STRIP)
            for (int64_t p = 0; p < n; p += COLUMNS) {
                const int used = vectors(n - p);
                strip<Type>(slopes + r * stride, stride, in + p * inner, inner, n - p, found);
                for (int s = 0; s < STRIP; s++)
                    for (int v = 0; v < used; v++)
                        Type::store(of_gate_up + (r + s) * e.width + from + p + v * LANES, _mm512_loadu_ps(found + s * COLUMNS + v * LANES));
            }
        pack_columns<Type>(grad, e.width, tokens, rows, from, n, in);
        for (int64_t r = 0; r < e.inner; r += STRIP)
            for (int64_t p = 0; p < n; p += COLUMNS) {
                strip<Type>(inners + r * stride, stride, in + p * inner, inner, n - p, found);
                put_columns<Type>(found, std::min<int64_t>(COLUMNS, n - p), of_down + (from + p) * e.inner + r, e.inner);
            }
    }

    // The sum over a token's rows of group g, times their weights where these are given, added to what earlier groups gave.
    void combine(int64_t g, int64_t t, const Number *rows, const float *weights, float *sums, Number *out) const {
        const int64_t begin = e.bounds[e.groups[g]], end = e.bounds[e.groups[g + 1]];
        for (int64_t d = 0; d < e.width; d += LANES) {
            __m512 sum = g ? _mm512_loadu_ps(sums + t * e.width + d) : _mm512_setzero_ps();
            for (int64_t k = 0; k < e.top_k; k++) {
                const int64_t row = e.places[t * e.top_k + k];
                if (row < begin || row >= end) continue;
                const __m512 factor = _mm512_set1_ps(weights ? weights[row] : 1);
                sum = _mm512_fmadd_ps(factor, Type::load(rows + (row - begin) * e.width + d), sum);
            }
            if (g + 1 == e.n_groups) Type::store(out + t * e.width + d, sum);
            else _mm512_storeu_ps(sums + t * e.width + d, sum);
        }
    }

    void forward(const Number *x, Number *rows, float *sums, Number *out) const {
#pragma omp parallel num_threads(e.threads)
        {
            Scratch one, two;
            for (int64_t g = 0; g < e.n_groups; g++) {
#pragma omp for schedule(dynamic, 1)
                for (size_t c = 0; c < chunks[g].size(); c++) forward_chunk(chunks[g][c], x, in_group(rows, g), one, two);
#pragma omp for schedule(static)
                for (int64_t t = 0; t < e.n_tokens; t++) combine(g, t, rows, e.weights, sums, out);
            }
        }
    }

    // Rows are numbered from the first of all; the room is that of a group.
    Number *in_group(Number *rows, int64_t g) const { return rows - e.bounds[e.groups[g]] * e.width; }

    // Columns of the experts' matrices that are computed together.
    std::vector<Chunk> parts() const {
        std::vector<Chunk> found;
        for (int64_t i = 0; i < e.n_experts; i++) {
            const int64_t n = std::max<int64_t>(e.bounds[i + 1] - e.bounds[i], 1);
            const int64_t fits = std::max<int64_t>(1, PACKED / (n * sizeof(Number)) / COLUMNS) * COLUMNS;
            const int64_t shared = up_to(e.width * e.n_experts / (4 * e.threads) + 1, COLUMNS), size = std::min(fits, shared);
            for (int64_t from = 0; from < e.width; from += size) found.push_back({i, from, std::min(size, e.width - from)});
        }
        return found;
    }

    void backward(const Number *x, const Number *grad, Number *rows, float *sums, Number *of_x, float *of_weights, Number *of_gate_up, Number *of_down) const {
        const std::vector<Chunk> columns = parts();
#pragma omp parallel num_threads(e.threads)
        {
            Scratch one, two, three;
            for (int64_t g = 0; g < e.n_groups; g++) {
#pragma omp for schedule(dynamic, 1)
                for (size_t c = 0; c < chunks[g].size(); c++)
                    backward_chunk(chunks[g][c], grad, in_group(rows, g), of_weights, one, two, three);
#pragma omp for schedule(static)
                for (int64_t t = 0; t < e.n_tokens; t++) combine(g, t, rows, nullptr, sums, of_x);
            }
#pragma omp for schedule(dynamic, 1)
            for (size_t c = 0; c < columns.size(); c++)
                matrix_columns(columns[c].expert, columns[c].begin, columns[c].n, x, grad, of_gate_up, of_down, one);
        }
    }
};

}  // namespace

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

extern "C" {

// From now on the C library keeps what is freed for what is asked for next: a page that is new to the process takes ten
// times as long to write as one that is not, and each training step asks for the same memory again.
void moekit_keep_memory() {
#ifdef __GLIBC__
    mallopt(M_MMAP_THRESHOLD, 1 << 30);
    mallopt(M_TRIM_THRESHOLD, INT32_MAX);
#endif
}

// `rows` is room for the rows of the longest group, `sums` for [n_tokens, width] where there are several groups.
void moekit_experts_forward(const moekit_experts *e, const void *x, void *rows, float *sums, void *out) {
    const int64_t widest = std::max(e->width, e->inner);
    if (e->bits == 16) Block<tiles::BFloat16>(*e, widest).forward((const uint16_t *)x, (uint16_t *)rows, sums, (uint16_t *)out);
    else Block<tiles::Float32>(*e, widest).forward((const float *)x, (float *)rows, sums, (float *)out);
}

// The hidden values are used up; gradients are written, not added to.
void moekit_experts_backward(const moekit_experts *e, const void *x, const void *grad, void *rows, float *sums, void *of_x, float *of_weights, void *of_gate_up, void *of_down) {
    const int64_t widest = std::max(e->width, 2 * e->inner);
    if (e->bits == 16)
        Block<tiles::BFloat16>(*e, widest).backward((const uint16_t *)x, (const uint16_t *)grad, (uint16_t *)rows, sums, (uint16_t *)of_x, of_weights, (uint16_t *)of_gate_up, (uint16_t *)of_down);
    else
        Block<tiles::Float32>(*e, widest).backward((const float *)x, (const float *)grad, (float *)rows, sums, (float *)of_x, of_weights, (float *)of_gate_up, (float *)of_down);
}
}
