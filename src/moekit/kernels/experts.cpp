// The expert block of a mixture of experts, forward and backward, for many tokens: y[t] = sum over its experts of
// w down (silu(gate x[t]) * up x[t]). What comes between the products is done while a tile is in the cache. Forward,
// matrices are read where they lie and tokens are packed as columns; backward, tokens are rows, and what runs along the
// other dimension is packed: so no matrix is ever transposed. Hidden values are kept as rows of [gate, up], one a token.

#include <omp.h>
#include <vector>

#include "broad.h"

extern "C" {

// The rows of a routing, sorted by expert, and the experts' matrices: [2 inner, width] (gate, then up) and [width, inner].
struct moekit_experts {
    const void *const *gate_up, *const *down;  // one address for each expert
    const int64_t *bounds;                     // rows bounds[e] to bounds[e + 1] are for expert e
    const int64_t *tokens;                     // whose row it is
    const int64_t *places;                     // the rows of each token, [n_tokens, top_k]; the number of rows: none
    const float *weights;                      // of each place
    float *row_weights;                        // of each row, which `forward` leaves for `backward`; or null
    const int64_t *groups;                     // experts groups[g] to groups[g + 1] are computed before the next ones
    void *const *hidden, *const *inners;       // room for each expert's gate and up, and for half as much; or null
    int64_t n_experts, n_groups, n_tokens, top_k, width, inner;
    int32_t bits, threads;
};
}

WIDE_BEGIN

namespace {

using namespace tiles;

constexpr int64_t PACKED = 3 << 18;  // bytes of packed columns that stay in a core's second cache
constexpr int64_t SHARED = 4 << 20;  // and in the one that cores share
constexpr int64_t CACHED = 16 << 20;  // bytes of rows that may wait in caches
constexpr int64_t EIGHT = 8;         // whole numbers of a vector
constexpr size_t MANY = 64;          // chunks

// Rows of an expert that are computed together: their columns are packed once and meet every strip of its matrices.
// `following` is the expert whose matrices the same thread is likely to need next.
struct Chunk { int64_t expert, begin, n, following; };

// Rows of an expert's matrix, down or gate_up, whose gradients are computed together.
struct Part { int64_t expert, begin, n; bool down; };

struct Scratch {
    rows::Buffer<Word> room;
    template <class T> T *take(int64_t bytes) {
        if (bytes > int64_t(4 * room.size())) room = rows::Buffer<Word>(bytes / 4 + LANES);
        return (T *)room.data();
    }
};

template <class Type> struct Block {
    using Number = typename Type::Number;
    const moekit_experts &e;
    std::vector<std::vector<Chunk>> chunks;  // of each group
    std::vector<bool> whole;                 // experts, one of many, whose rows are one chunk
    bool many = false;                       // whether the rows of some group are more than may wait in caches

    // `widest` is the longest inner dimension of the products with packed columns.
    Block(const moekit_experts &experts, int64_t widest) : e(experts), chunks(experts.n_groups), whole(experts.n_experts) {
        const int64_t room = std::max<int64_t>(COLUMNS, PACKED / (4 * words(widest)) / LANES * LANES);
        for (int64_t g = 0; g < e.n_groups; g++) {
            many = many || (e.bounds[e.groups[g + 1]] - e.bounds[e.groups[g]]) * e.width * int64_t(sizeof(Number)) > CACHED;
            for (int64_t i = e.groups[g]; i < e.groups[g + 1]; i++) {
                const int64_t n = e.bounds[i + 1] - e.bounds[i];
                const bool few = e.groups[g + 1] - e.groups[g] < 4 * e.threads;
                const int64_t size = n ? chunk_size(n, room, few ? e.threads : 1) : 1;
                whole[i] = n && size >= n && !few;
                for (int64_t begin = 0; begin < n; begin += size) chunks[g].push_back({i, begin, std::min(size, n - begin), i});
            }
            // A few: the longest first, so that threads end together. Many end together anyway, and memory likes their order.
            if (chunks[g].size() < MANY) std::stable_sort(chunks[g].begin(), chunks[g].end(), [](const Chunk &a, const Chunk &b) { return a.n > b.n; });
            for (size_t c = 0; c < chunks[g].size(); c++) chunks[g][c].following = chunks[g][std::min(c + e.threads, chunks[g].size() - 1)].expert;
        }
    }

    // At most `room` rows, in whole vectors, so that as many threads as there are for `n` rows end together.
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
    static int64_t packed(int64_t inner, int64_t columns) { return 4 * words(inner) * panels(columns) * COLUMNS; }
    static int vectors(int64_t columns) { return int(std::min<int64_t>(VECTORS, (columns + LANES - 1) / LANES)); }
    const Number *gate_up(int64_t i) const { return (const Number *)e.gate_up[i]; }
    const Number *down(int64_t i) const { return (const Number *)e.down[i]; }
    static Left rows_from(const Number *at, int64_t stride) { return {(const Word *)at, words(stride), nullptr}; }

    // Whether rows of so many numbers, from `at` on, begin with whole lines.
    static bool whole_lines(const Number *at, int64_t n) { return n * sizeof(Number) % LINE == 0 && (uintptr_t)at % LINE == 0; }

    static void ask_for(const Number *row, int64_t n) {
        for (int64_t d = 0; d < n; d += LINE / sizeof(Number)) ask(row + d);
    }

    // While n columns of an expert's result from d on are computed: a part of the first strips of another's gate and up.
    void ask_for_strips(int64_t expert, int64_t d, int64_t n) const {
        for (int64_t row = 2 * STRIP * d / e.width; row < 2 * STRIP * (d + n) / e.width; row++)
            ask_for(gate_up(expert) + (row % STRIP + row / STRIP * e.inner) * e.width, e.width);
    }

    // silu(gate) * up of a strip and a panel, into the panel of the second product.
    void activate(const float *gate, const float *up, int64_t row, int used, Word *panel) const {
        for (int r = 0; r < STRIP; r += Type::PER_WORD)
            for (int v = 0; v < used; v++) {
                __m512 inner[2];
                for (int i = 0; i < Type::PER_WORD; i++) {
                    const int64_t at = (r + i) * COLUMNS + v * LANES;
                    const __m512 g = _mm512_loadu_ps(gate + at), u = _mm512_loadu_ps(up + at);
                    inner[i] = _mm512_mul_ps(_mm512_mul_ps(g, sigmoid(g)), u);
                }
                _mm512_storeu_si512(panel + words(row + r) * COLUMNS + v * LANES, Type::words(inner[0], inner[Type::PER_WORD - 1]));
            }
    }

    void forward_chunk(const Chunk &c, const Number *x, Number *rows, Scratch &one, Scratch &two) const {
        const int64_t width = words(e.width), inner = words(e.inner), begin = e.bounds[c.expert] + c.begin;
        Word *in = one.take<Word>(packed(e.width, c.n)), *between = two.take<Word>(packed(e.inner, c.n));
        Number *kept = e.hidden ? (Number *)e.hidden[c.expert] + 2 * c.begin * e.inner : nullptr;
        in_panels(c.n, [&](int64_t p, int64_t first, int64_t n) { pack_rows(x, e.width, e.tokens + begin + first, n, e.bounds[e.n_experts] - begin - first, width, in + p * width * COLUMNS); });
        alignas(LINE) Found gate, up;
        for (int64_t i = 0; i < e.inner; i += STRIP)
            in_panels(c.n, [&](int64_t p, int64_t first, int64_t n) {
                const Number *matrix = gate_up(c.expert) + i * e.width, *other = matrix + e.inner * e.width;
                const Word *panel = in + p * width * COLUMNS;
                const bool last = i + STRIP == e.inner;
                strip<Type>(matrix, e.width, panel, width, n, gate, last ? down(c.expert) : matrix + STRIP * e.width);
                strip<Type>(other, e.width, panel, width, n, up, last ? down(c.expert) + words(e.width) : other + STRIP * e.width);
                activate(gate, up, i, vectors(n), between + p * inner * COLUMNS);
                if (!kept) return;
                put_columns<Type>(gate, n, kept + 2 * first * e.inner + i, 2 * e.inner);
                put_columns<Type>(up, n, kept + (2 * first + 1) * e.inner + i, 2 * e.inner);
            });
        constexpr int64_t OF_A_LINE = LINE / sizeof(Number);
        const bool past_caches = many && whole_lines(rows, e.width);
        for (int64_t d = 0; d < e.width; d += OF_A_LINE) {
            const int64_t numbers = std::min(OF_A_LINE, e.width - d);
            ask_for_strips(c.following, d, numbers);
            in_panels(c.n, [&](int64_t p, int64_t first, int64_t n) {
                float *const found[] = {gate, up};
                for (int64_t i = 0; i < numbers; i += STRIP) {
                    const Number *matrix = down(c.expert) + (d + i) * e.inner;
                    const Number *next = d + i + STRIP == e.width ? matrix : matrix + STRIP * e.inner;
                    strip<Type>(matrix, e.inner, between + p * inner * COLUMNS, inner, n, found[i / STRIP], next);
                }
                put_lines<Type>(found, n, numbers, {rows + (begin + first) * e.width + d, e.width, past_caches});
            });
        }
        _mm_sfence();
    }

    // The gradients of gate and up from `raw`, that of silu(gate) * up without the row's weight, in their place, for
    // `columns` numbers of n rows from `begin` on; inner becomes the weighted silu(gate) * up.
    void slopes(const float *raw, int64_t begin, int64_t n, int64_t columns, Number *gate, Number *inner, float *row_slopes) const {
        const __m512 one = _mm512_set1_ps(1);
        for (int64_t row = 0; row < n; row++, raw += BROAD, gate += 2 * e.inner, inner += e.inner) {
            const __m512 w = _mm512_set1_ps(e.row_weights[begin + row]);
            __m512 sum = _mm512_setzero_ps();
            for (int64_t i = 0; i < columns; i += LANES) {
                Number *up = gate + e.inner;
                const __m512 g = Type::load(gate + i), u = Type::load(up + i), s = sigmoid(g), silu = _mm512_mul_ps(g, s);
                const __m512 product = _mm512_mul_ps(silu, u), slope = _mm512_loadu_ps(raw + i), weighted = _mm512_mul_ps(slope, w);
                sum = _mm512_fmadd_ps(slope, product, sum);
                Type::store(up + i, _mm512_mul_ps(weighted, silu));
                // d silu / d g = s (1 + g (1 - s))
                const __m512 of_silu = _mm512_mul_ps(s, _mm512_fmadd_ps(g, _mm512_sub_ps(one, s), one));
                Type::store(gate + i, _mm512_mul_ps(_mm512_mul_ps(weighted, u), of_silu));
                Type::store(inner + i, _mm512_mul_ps(product, w));
            }
            row_slopes[begin + row] += _mm512_reduce_add_ps(sum);
        }
    }

    // From the gradient of the tokens: of the rows' weights, of gate and up (in their place), of the rows of x; inners
    // become the weighted silu(gate) * up.
    void backward_chunk(const Chunk &c, const Number *grad, Number *rows, float *row_slopes, Scratch &one) const {
        const int64_t begin = e.bounds[c.expert] + c.begin, inner = e.inner, width = e.width, *tokens = e.tokens + begin;
        Word *panel = one.take<Word>(4 * BROAD * words(std::max(width, 2 * inner)));
        std::fill_n(row_slopes + begin, c.n, 0.0f);
        Number *hidden = (Number *)e.hidden[c.expert] + 2 * c.begin * inner, *inners = (Number *)e.inners[c.expert] + c.begin * inner;
        alignas(LINE) float found[BROAD_ROWS * BROAD];
        for (int64_t i = 0; i < inner; i += BROAD) {
            const int64_t columns = std::min<int64_t>(BROAD, inner - i);
            const bool last = i + BROAD >= inner;
            const NextPanel<Number> next(last ? gate_up(c.expert) : down(c.expert) + i + BROAD, sizeof(Number) * (last ? width : inner), last ? 2 * inner : width, c.n, words(width));
            in_strips(c.n, [&](int64_t s, int64_t r, int64_t n) {
                for (int64_t after = r + n; i == 0 && after < std::min(r + 2 * n, c.n); after++) ask_for(grad + tokens[after] * width, width);
                for (int64_t half = 2 * r; half < 2 * (r + n); half++) ask_for(hidden + half * inner + i, columns);
                broad<Type, Float32>(Left{(const Word *)grad, words(width), tokens + r}, n, {panel, s ? nullptr : down(c.expert) + i, inner}, words(width), columns, {found, BROAD, false}, next.of_strip(s));
                slopes(found, begin + r, n, columns, hidden + 2 * r * inner + i, inners + r * inner + i, row_slopes);
            });
        }
        const bool past_caches = many && whole_lines(rows, e.width);
        for (int64_t d = 0; d < width; d += BROAD) {
            const int64_t columns = std::min<int64_t>(BROAD, width - d);
            const bool last = d + BROAD >= width;
            const NextPanel<Number> next(last ? down(c.following) : gate_up(c.expert) + d + BROAD, sizeof(Number) * (last ? inner : width), last ? width : 2 * inner, c.n, 2 * words(inner));
            in_strips(c.n, [&](int64_t s, int64_t r, int64_t n) {
                Number *to = rows + (begin + r) * width + d;
                broad<Type, Type>(rows_from(hidden + 2 * r * inner, 2 * inner), n, {panel, s ? nullptr : gate_up(c.expert) + d, width}, 2 * words(inner), columns, {to, width, past_caches}, next.of_strip(s));
            });
        }
        _mm_sfence();
    }

    // Rows [from, from + n) of to[..][columns]: the sums over an expert's rows of products of a number on the left with one
    // on the right.
    void sums_of_products(const Rows<Number> &left, int64_t from, int64_t n, const Rows<Number> &right, int64_t columns, int64_t rows, Number *to, Scratch &one, Scratch &two) const {
        const int64_t inner = words(up_to(rows, Type::PER_WORD)), panel = 4 * BROAD * std::max<int64_t>(inner, 1);
        const int64_t fits = std::max<int64_t>(1, SHARED / panel) * BROAD;
        const bool past_caches = whole_lines(to, columns);
        Word *own = one.take<Word>(panel), *panels = two.take<Word>(panel * up_to(std::min(fits, columns), BROAD) / BROAD);
        for (int64_t begin = 0; begin < columns; begin += fits) {
            const int64_t size = std::min(fits, columns - begin);
            pack_columns<Type>(right, rows, begin, size, panels);
            for (int64_t l = from; l < from + n; l += BROAD) {
                const int64_t n_left = std::min<int64_t>(BROAD, from + n - l);
                pack_columns<Type>(left, rows, l, n_left, own);
                for (int64_t p = 0; p < size; p += BROAD)
                    in_strips(n_left, [&](int64_t, int64_t r, int64_t n_rows) {
                        Number *at = to + (l + r) * columns + begin + p;
                        broad<Type, Type>(Columns{own + r}, n_rows, {panels + p * inner}, inner, size - p, {at, columns, past_caches}, {});
                    });
            }
        }
        _mm_sfence();  // what went past the caches is there for whoever comes next
    }

    // A part of the gradient of one of an expert's matrices, from the gradients of its rows.
    void matrix_part(const Part &part, const Number *x, const Number *grad, Number *of_gate_up, Number *of_down, Scratch &one, Scratch &two) const {
        const int64_t i = part.expert, n = e.bounds[i + 1] - e.bounds[i];
        const Rows<Number> slopes{(const Number *)e.hidden[i], 2 * e.inner, nullptr}, inners{(const Number *)e.inners[i], e.inner, nullptr};
        if (part.down) sums_of_products(rows_of_tokens(grad, i), part.begin, part.n, inners, e.inner, n, of_down + i * e.width * e.inner, one, two);
        else sums_of_products(slopes, part.begin, part.n, rows_of_tokens(x, i), e.width, n, of_gate_up + 2 * i * e.inner * e.width, one, two);
    }

    // What an expert's tokens have in `x` or in the gradient.
    Rows<Number> rows_of_tokens(const Number *x, int64_t expert) const { return {x, e.width, e.tokens + e.bounds[expert]}; }

    // The rows of a token that lie in a group, counted from the group's first, and their weights.
    struct Token {
        std::vector<int64_t> rows;
        std::vector<float> weights;
        int64_t n = 0;
        explicit Token(int64_t top_k) : rows(top_k + EIGHT), weights(top_k + EIGHT) {}
    };

    // Those of token t in group g; eight places are written at a time.
    void find(int64_t t, int64_t g, Token &token) const {
        const int64_t first = e.bounds[e.groups[g]], size = e.bounds[e.groups[g + 1]] - first;
        token.n = 0;
        for (int64_t k = 0; t < e.n_tokens && k < e.top_k; k += EIGHT) {
            const __mmask8 there = __mmask8(wide::first(std::min(e.top_k - k, EIGHT)));
            const int64_t at = t * e.top_k + k;
            const __m512i rows = _mm512_sub_epi64(_mm512_maskz_loadu_epi64(there, e.places + at), _mm512_set1_epi64(first));
            // As numbers without a sign, rows of earlier groups are large.
            const __mmask8 own = _mm512_mask_cmplt_epu64_mask(there, rows, _mm512_set1_epi64(size));
            _mm512_storeu_si512(&token.rows[token.n], _mm512_maskz_compress_epi64(own, rows));
            _mm256_storeu_ps(&token.weights[token.n], _mm256_maskz_compress_ps(own, _mm256_maskz_loadu_ps(there, e.weights + at)));
            token.n += __builtin_popcount(own);
        }
    }

    // V vectors, from column d on, of the sum over a token's rows, which begins with what earlier groups gave. The rows of a
    // later token are asked for.
    template <int V>
    void combine_columns(const Number *rows, int64_t d, const Token &own, const Token &later, bool weighted, float *sums, Number *out, bool first, bool last) const {
        __m512 sum[V];
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) sum[v] = first ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + d + v * LANES);
        if (!first)
            for (int64_t at = 0; at < V * LANES; at += LINE / sizeof(float)) ask(sums + e.width + d + at);
        for (int64_t i = 0; i < later.n; i++)
            for (int64_t at = 0; at < V * LANES; at += LINE / sizeof(Number)) ask(rows + later.rows[i] * e.width + d + at);
        for (int64_t i = 0; i < own.n; i++) {
            const __m512 factor = _mm512_set1_ps(weighted ? own.weights[i] : 1);
#pragma GCC unroll 8
            for (int v = 0; v < V; v++) sum[v] = _mm512_fmadd_ps(factor, Type::load(rows + own.rows[i] * e.width + d + v * LANES), sum[v]);
        }
#pragma GCC unroll 8
        for (int v = 0; v < V; v++)
            if (last) Type::store(out + d + v * LANES, sum[v]);
            else _mm512_storeu_ps(sums + d + v * LANES, sum[v]);
    }

    // For all tokens, the sums over their rows of group g, times their weights if wanted, added to what earlier groups gave.
    // then(t, token) follows. Called by all threads at once.
    template <class Then>
    void combine(int64_t g, const Number *rows, bool weighted, float *sums, Number *out, const Then &then) const {
        constexpr int AT_ONCE = 2;  // vectors: little of many rows, so that what is asked for comes from many places of memory
        Token own(e.top_k), next(e.top_k), later(e.top_k);
        const bool first = g == 0, last = g + 1 == e.n_groups;
        bool begun = false;
#pragma omp for schedule(static)
        for (int64_t t = 0; t < e.n_tokens; t++) {
            if (!begun) find(t, g, next), find(t + 1, g, later);
            begun = true;
            std::swap(own, next), std::swap(next, later);
            find(t + 2, g, later);
            float *const sum = sums ? sums + t * e.width : nullptr;
            in_blocks<AT_ONCE>(e.width, [&](auto v, int64_t d) {
                combine_columns<v>(rows, d, own, later, weighted, sum, out + t * e.width, first, last);
            });
            then(t, own);
        }
    }

    void forward(const Number *x, Number *rows, float *sums, Number *out) const {
#pragma omp parallel num_threads(e.threads)
        {
            Scratch one, two;
            for (int64_t g = 0; g < e.n_groups; g++) {
#pragma omp for schedule(dynamic, 1)
                for (size_t c = 0; c < chunks[g].size(); c++) forward_chunk(chunks[g][c], x, in_group(rows, g), one, two);
                combine(g, rows, true, sums, out, [&](int64_t, const Token &token) {
                    for (int64_t i = 0; e.row_weights && i < token.n; i++) e.row_weights[e.bounds[e.groups[g]] + token.rows[i]] = token.weights[i];
                });
            }
        }
    }

    // Rows are numbered from the first of all; the room is that of a group.
    Number *in_group(Number *rows, int64_t g) const { return rows - e.bounds[e.groups[g]] * e.width; }

    std::vector<Part> parts() const {
        std::vector<Part> found;
        const int64_t pieces = std::min<int64_t>(e.threads, (8 * e.threads + e.n_experts - 1) / e.n_experts);
        for (int64_t i = 0; i < e.n_experts; i++)
            for (bool down : {false, true}) {
                if (whole[i]) continue;
                const int64_t n = down ? e.width : 2 * e.inner, size = up_to((n + pieces - 1) / pieces, BROAD);
                for (int64_t begin = 0; begin < n; begin += size) found.push_back({i, begin, std::min(size, n - begin), down});
            }
        return found;
    }

    void backward(const Number *x, const Number *grad, Number *rows, float *sums, Number *of_x, float *row_slopes, float *of_weights, Number *of_gate_up, Number *of_down) const {
        const std::vector<Part> all = parts();
#pragma omp parallel num_threads(e.threads)
        {
            Scratch one, two;
            for (int64_t g = 0; g < e.n_groups; g++) {
#pragma omp for schedule(dynamic, 1)
                for (size_t c = 0; c < chunks[g].size(); c++) {
                    const int64_t i = chunks[g][c].expert;
                    backward_chunk(chunks[g][c], grad, in_group(rows, g), row_slopes, one);
                    if (!whole[i]) continue;
                    // The gradients of its matrices follow while what they are made of is in the caches.
                    for (const Part &part : {Part{i, 0, e.width, true}, Part{i, 0, 2 * e.inner, false}}) matrix_part(part, x, grad, of_gate_up, of_down, one, two);
                }
                combine(g, rows, false, sums, of_x, [&](int64_t t, const Token &) {
                    for (int64_t place = t * e.top_k; g + 1 == e.n_groups && place < (t + 1) * e.top_k; place++)
                        of_weights[place] = e.places[place] < e.bounds[e.n_experts] ? row_slopes[e.places[place]] : 0;
                });
            }
#pragma omp for schedule(dynamic, 1)
            for (size_t p = 0; p < all.size(); p++)
                matrix_part(all[p], x, grad, of_gate_up, of_down, one, two);
        }
    }
};

}  // namespace

WIDE_END

extern "C" {

// `rows` is room for the rows of the longest group, `sums` for [n_tokens, width] where there are several groups.
void moekit_experts_forward(const moekit_experts *e, const void *x, void *rows, float *sums, void *out) {
    const int64_t widest = std::max(e->width, e->inner);
    if (e->bits == 16) Block<tiles::BFloat16>(*e, widest).forward((const uint16_t *)x, (uint16_t *)rows, sums, (uint16_t *)out);
    else Block<tiles::Float32>(*e, widest).forward((const float *)x, (float *)rows, sums, (float *)out);
}

// The hidden values are used up; gradients are written, not added to. `row_slopes` is room for a number of each row.
void moekit_experts_backward(const moekit_experts *e, const void *x, const void *grad, void *rows, float *sums, void *of_x, float *row_slopes, float *of_weights, void *of_gate_up, void *of_down) {
    const int64_t widest = std::max(e->width, 2 * e->inner);
    if (e->bits == 16)
        Block<tiles::BFloat16>(*e, widest).backward((const uint16_t *)x, (const uint16_t *)grad, (uint16_t *)rows, sums, (uint16_t *)of_x, row_slopes, of_weights, (uint16_t *)of_gate_up, (uint16_t *)of_down);
    else
        Block<tiles::Float32>(*e, widest).backward((const float *)x, (const float *)grad, (float *)rows, sums, (float *)of_x, row_slopes, of_weights, (float *)of_gate_up, (float *)of_down);
}
}
