// The expert block of a mixture of experts, forward and backward, for many tokens: y[t] = sum over its experts of
// w down (silu(gate x[t]) * up x[t]). What comes between the products is done while a tile is in the cache. Forward,
// matrices are read where they lie and tokens are packed as columns; backward, tokens are rows, and what runs along the
// other dimension is packed: so no matrix is ever transposed, but those of narrow experts with many rows, which are rows forward
// too. Hidden values are kept as rows of [gate, up], one a token.

#include <omp.h>
#include <vector>

#include "broad.h"
#include "combine.h"
#include "scatter.h"

WIDE_BEGIN

namespace {

using namespace tiles;

constexpr int64_t PACKED = 3 << 18;  // bytes of packed columns that stay in a core's second cache
constexpr int64_t SHARED = 4 << 20;  // and in the one that cores share
constexpr int64_t CACHED = 16 << 20;  // bytes of rows that may wait in caches
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
    const bool many;                         // whether rows are more than may wait in caches

    // `widest` is the longest inner dimension of the products with packed columns.
    Block(const moekit_experts &experts, int64_t widest) : e(experts), chunks(experts.n_groups), whole(experts.n_experts), many(experts.bounds[experts.n_experts] * experts.width * int64_t(sizeof(Number)) > CACHED) {
        const int64_t room = std::max<int64_t>(COLUMNS, PACKED / (4 * words(widest)) / LANES * LANES);
        for (int64_t g = 0; g < e.n_groups; g++) {
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
                    inner[i] = _mm512_mul_ps(silu(g), u);
                }
                _mm512_storeu_si512(panel + words(row + r) * COLUMNS + v * LANES, Type::words(inner[0], inner[Type::PER_WORD - 1]));
            }
    }

    void forward_chunk(const Chunk &c, const Number *x, Number *rows, Scratch &one, Scratch &two, Combine<Type> &meanwhile) const {
        const int64_t width = words(e.width), inner = words(e.inner), begin = e.bounds[c.expert] + c.begin;
        Word *in = one.take<Word>(packed(e.width, c.n)), *between = two.take<Word>(packed(e.inner, c.n));
        Number *kept = e.hidden ? (Number *)e.hidden[c.expert] + 2 * c.begin * e.inner : nullptr;
        in_panels(c.n, [&](int64_t p, int64_t first, int64_t n) { pack_rows<COLUMNS, Number>({x, e.width, e.tokens + begin + first}, n, e.bounds[e.n_experts] - begin - first, width, in + p * width * COLUMNS); });
        alignas(LINE) Found gate, up;
        for (int64_t i = 0; i < e.inner; i += STRIP)
            in_panels(c.n, [&](int64_t p, int64_t first, int64_t n) {
                const Number *matrix = gate_up(c.expert) + i * e.width, *other = matrix + e.inner * e.width;
                const Word *panel = in + p * width * COLUMNS;
                const bool last = i + STRIP == e.inner;
                strip<Type>(matrix, e.width, panel, width, n, gate, last ? down(c.expert) : matrix + STRIP * e.width, meanwhile.lines());
                meanwhile.after(2 * width);
                strip<Type>(other, e.width, panel, width, n, up, last ? down(c.expert) + words(e.width) : other + STRIP * e.width, meanwhile.lines());
                meanwhile.after(2 * width);
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
                    strip<Type>(matrix, e.inner, between + p * inner * COLUMNS, inner, n, found[i / STRIP], next, meanwhile.lines());
                    meanwhile.after(2 * inner);
                }
                put_lines<Type>(found, n, numbers, {rows + (begin + first) * e.width + d, e.width, past_caches});
            });
        }
        _mm_sfence();
    }

    // Gate and up of rows, and their weighted silu(gate) * up, for rows that are added up as they are computed. Tokens are rows:
    // where an expert has many of these, turning its matrix is less than turning them. A panel takes as much of gate as of up.
    void hidden_chunk(const Chunk &c, const Number *x, Scratch &one) const {
        const int64_t begin = e.bounds[c.expert] + c.begin, inner = e.inner, width = e.width, *tokens = e.tokens + begin;
        Word *panel = one.take<Word>(4 * BROAD * words(width));
        Number *kept = e.hidden ? (Number *)e.hidden[c.expert] + 2 * c.begin * inner : nullptr, *inners = (Number *)e.inners[c.expert] + c.begin * inner;
        alignas(LINE) float found[TALL_ROWS * BROAD];
        for (int64_t i = 0; i < inner; i += BROAD / 2) {
            const int64_t n_gate = std::min<int64_t>(BROAD / 2, inner - i);
            for (int64_t up : {0, 1}) pack_rows<BROAD, Number>({gate_up(c.expert) + (up * inner + i) * width, width, nullptr}, n_gate, n_gate, words(width), panel + up * n_gate);
            in_strips(c.n, 2 * n_gate, [&](int64_t, int64_t r, int64_t n) {
                for (int64_t after = r + n; after < std::min(r + 2 * n, c.n); after++) ask_for(x + tokens[after] * width, width);
                broad<Type, Float32>(Left{(const Word *)x, words(width), tokens + r}, n, {panel}, words(width), 2 * n_gate, {found, BROAD, false}, {(const char *)panel, 0}, nullptr);
                for (int64_t row = r; row < r + n; row++)
                    for (int64_t j = 0; j < n_gate; j += LANES) {
                        const float *at = found + (row - r) * BROAD + j;
                        const __m512 g = _mm512_load_ps(at), u = _mm512_load_ps(at + n_gate), weight = _mm512_set1_ps(e.row_weights[begin + row]);
                        Type::store(inners + row * inner + i + j, _mm512_mul_ps(_mm512_mul_ps(silu(g), u), weight));
                        if (kept) Type::store(kept + 2 * row * inner + i + j, g), Type::store(kept + (2 * row + 1) * inner + i + j, u);
                    }
            });
        }
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

    // From the gradient of the tokens: of the rows' weights, of gate and up (in their place); inners become the weighted
    // silu(gate) * up. What is packed next are `n_then` rows of a matrix of so many columns, from `then` on.
    void slopes_chunk(const Chunk &c, const Number *grad, float *row_slopes, const Number *then, int64_t columns_then, int64_t n_then, Scratch &one, Combine<Type> &meanwhile) const {
        const int64_t begin = e.bounds[c.expert] + c.begin, inner = e.inner, width = e.width, *tokens = e.tokens + begin;
        Word *panel = one.take<Word>(4 * BROAD * words(std::max(width, 2 * inner)));
        std::fill_n(row_slopes + begin, c.n, 0.0f);
        Number *hidden = (Number *)e.hidden[c.expert] + 2 * c.begin * inner, *inners = (Number *)e.inners[c.expert] + c.begin * inner;
        alignas(LINE) float found[TALL_ROWS * BROAD];
        for (int64_t i = 0; i < inner; i += BROAD) {
            const int64_t columns = std::min<int64_t>(BROAD, inner - i);
            const bool last = i + BROAD >= inner;
            const NextPanel<Number> next(last ? then : down(c.expert) + i + BROAD, sizeof(Number) * (last ? columns_then : inner), last ? n_then : width, strips_of(c.n, columns), words(width));
            in_strips(c.n, columns, [&](int64_t s, int64_t r, int64_t n) {
                for (int64_t after = r + n; i == 0 && after < std::min(r + 2 * n, c.n); after++) ask_for(grad + tokens[after] * width, width);
                for (int64_t half = 2 * r; half < 2 * (r + n); half++) ask_for(hidden + half * inner + i, columns);
                broad<Type, Float32>(Left{(const Word *)grad, words(width), tokens + r}, n, {panel, s ? nullptr : down(c.expert) + i, inner}, words(width), columns, {found, BROAD, false}, next.of_strip(s), meanwhile.lines());
                meanwhile.after(words(width));
                slopes(found, begin + r, n, columns, hidden + 2 * r * inner + i, inners + r * inner + i, row_slopes);
            });
        }
    }

    // From the gradients of gate and up, those of the rows of x.
    void rows_chunk(const Chunk &c, Number *rows, Scratch &one, Combine<Type> &meanwhile) const {
        const int64_t begin = e.bounds[c.expert] + c.begin, inner = e.inner, width = e.width;
        const Number *hidden = (const Number *)e.hidden[c.expert] + 2 * c.begin * inner;
        Word *panel = one.take<Word>(4 * BROAD * 2 * words(inner));
        const bool past_caches = many && whole_lines(rows, e.width);
        for (int64_t d = 0; d < width; d += BROAD) {
            const int64_t columns = std::min<int64_t>(BROAD, width - d);
            const bool last = d + BROAD >= width;
            const NextPanel<Number> next(last ? down(c.following) : gate_up(c.expert) + d + BROAD, sizeof(Number) * (last ? inner : width), last ? width : 2 * inner, strips_of(c.n, columns), 2 * words(inner));
            in_strips(c.n, columns, [&](int64_t s, int64_t r, int64_t n) {
                Number *to = rows + (begin + r) * width + d;
                broad<Type, Type>(rows_from(hidden + 2 * r * inner, 2 * inner), n, {panel, s ? nullptr : gate_up(c.expert) + d, width}, 2 * words(inner), columns, {to, width, past_caches}, next.of_strip(s), meanwhile.lines());
                meanwhile.after(2 * words(inner));
            });
        }
        _mm_sfence();
    }

    // Rows [from, from + n) of to[..][columns]: the sums over an expert's rows of products of a number on the left with one
    // on the right.
    void sums_of_products(const Rows<Number> &left, int64_t from, int64_t n, const Rows<Number> &right, int64_t columns, int64_t rows, Number *to, Scratch &one, Scratch &two, Combine<Type> &meanwhile) const {
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
                    in_strips(n_left, size - p, [&](int64_t, int64_t r, int64_t n_rows) {
                        Number *at = to + (l + r) * columns + begin + p;
                        broad<Type, Type>(Columns{own + r}, n_rows, {panels + p * inner}, inner, size - p, {at, columns, past_caches}, {}, meanwhile.lines());
                        meanwhile.after(inner);
                    });
            }
        }
        _mm_sfence();  // what went past the caches is there for whoever comes next
    }

    // A part of the gradient of one of an expert's matrices, from the gradients of its rows.
    void matrix_part(const Part &part, const Number *x, const Number *grad, Number *of_gate_up, Number *of_down, Scratch &one, Scratch &two, Combine<Type> &meanwhile) const {
        const int64_t i = part.expert, n = e.bounds[i + 1] - e.bounds[i];
        const Rows<Number> slopes{(const Number *)e.hidden[i], 2 * e.inner, nullptr}, inners{(const Number *)e.inners[i], e.inner, nullptr};
        if (part.down) sums_of_products(rows_of_tokens(grad, i), part.begin, part.n, inners, e.inner, n, of_down + i * e.width * e.inner, one, two, meanwhile);
        else sums_of_products(slopes, part.begin, part.n, rows_of_tokens(x, i), e.width, n, of_gate_up + 2 * i * e.inner * e.width, one, two, meanwhile);
    }

    // What an expert's tokens have in `x` or in the gradient.
    Rows<Number> rows_of_tokens(const Number *x, int64_t expert) const { return {x, e.width, e.tokens + e.bounds[expert]}; }

    // Where the rows of a group lie, in room for those of any two that follow each other: from its beginning on, or up to its end.
    Number *in_room(Number *room, int64_t g) const {
        const int64_t rows = e.bounds[e.groups[g + 1]] - e.bounds[e.groups[g]];
        return g % 2 ? room + (e.room_rows - rows) * e.width : room;
    }

    // each(chunk, rows) for all chunks of all groups, by all threads at once, till all are done; rows are numbered from the first
    // of all, where there is room for them. Then the last group alone is still to be added up.
    template <class Each> void in_groups(Number *room, Combine<Type> &sum, const Each &each) const {
        for (int64_t g = 0; g < e.n_groups; g++) {
            Number *const own = e.scatters ? nullptr : in_room(room, g);
#pragma omp for schedule(dynamic, 1) nowait
            for (size_t c = 0; c < chunks[g].size(); c++) each(chunks[g][c], own ? own - e.bounds[e.groups[g]] * e.width : nullptr);
            if (e.scatters) continue;
            sum.finish();
#pragma omp barrier
            sum.begin(g, own);
        }
        if (e.scatters) {
#pragma omp barrier
        }
    }

    bool has_row(int64_t place) const { return e.places[place] < e.bounds[e.n_experts]; }

    void forward(const Number *x, Number *room, float *sums, Number *out) const {
        ScatterAdd<Type> scatter(e, {e.inners, e.down, e.inner, true});
#pragma omp parallel num_threads(e.threads)
        {
            Scratch one, two;
            Combine<Type> sum(e, true, sums, out, 2 * words(std::max(e.width, e.inner)));
#pragma omp for schedule(static) nowait
            for (int64_t place = 0; place < e.n_tokens * e.top_k; place++)
                if (e.row_weights && has_row(place)) e.row_weights[e.places[place]] = e.weights[place];
            if (e.scatters) {  // rows are weighted at once
#pragma omp barrier
            }
            in_groups(room, sum, [&](const Chunk &c, Number *rows) {
                if (e.scatters) hidden_chunk(c, x, one);
                else forward_chunk(c, x, rows, one, two, sum);
            });
            if (e.scatters) scatter.run(out);
            else sum.finish();
        }
    }

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

    // Words of the inner dimension of the longest product of the backward pass.
    int64_t longest() const {
        int64_t found = std::max(e.width, 2 * e.inner);
        for (int64_t i = 0; i < e.n_experts; i++) found = std::max(found, up_to(e.bounds[i + 1] - e.bounds[i], Type::PER_WORD));
        return words(found);
    }

    void backward(const Number *x, const Number *grad, Number *room, float *sums, Number *of_x, float *row_slopes, float *of_weights, Number *of_gate_up, Number *of_down) const {
        const std::vector<Part> all = parts();
        ScatterAdd<Type> scatter(e, {e.hidden, e.gate_up, 2 * e.inner, false});
#pragma omp parallel num_threads(e.threads)
        {
            Scratch one, two;
            Combine<Type> sum(e, false, sums, of_x, longest());
            const auto of_matrix = [&](const Part &part) { matrix_part(part, x, grad, of_gate_up, of_down, one, two, sum); };
            in_groups(room, sum, [&](const Chunk &c, Number *rows) {
                if (e.scatters) slopes_chunk(c, grad, row_slopes, down(c.following), e.inner, e.width, one, sum);
                else {
                    slopes_chunk(c, grad, row_slopes, gate_up(c.expert), e.width, 2 * e.inner, one, sum);
                    rows_chunk(c, rows, one, sum);
                }
                if (!whole[c.expert]) return;
                // The gradients of its matrices follow while what they are made of is in the caches.
                of_matrix({c.expert, 0, e.width, true}), of_matrix({c.expert, 0, 2 * e.inner, false});
            });
#pragma omp for schedule(dynamic, 1) nowait
            for (size_t p = 0; p < all.size(); p++) of_matrix(all[p]);
            if (e.scatters) scatter.run(of_x);
            else sum.finish();
#pragma omp for schedule(static) nowait
            for (int64_t place = 0; place < e.n_tokens * e.top_k; place++) of_weights[place] = has_row(place) ? row_slopes[e.places[place]] : 0;
        }
    }
};

}  // namespace

WIDE_END

extern "C" {

// `room` is for `room_rows` rows, `sums` for [n_tokens, width] where there are several groups.
void moekit_experts_forward(const moekit_experts *e, const void *x, void *room, float *sums, void *out) {
    const int64_t widest = std::max(e->width, e->inner);
    if (e->bits == 16) Block<tiles::BFloat16>(*e, widest).forward((const uint16_t *)x, (uint16_t *)room, sums, (uint16_t *)out);
    else Block<tiles::Float32>(*e, widest).forward((const float *)x, (float *)room, sums, (float *)out);
}

// The hidden values are used up; gradients are written, not added to. `row_slopes` is room for a number of each row.
void moekit_experts_backward(const moekit_experts *e, const void *x, const void *grad, void *room, float *sums, void *of_x, float *row_slopes, float *of_weights, void *of_gate_up, void *of_down) {
    const int64_t widest = std::max(e->width, 2 * e->inner);
    if (e->bits == 16)
        Block<tiles::BFloat16>(*e, widest).backward((const uint16_t *)x, (const uint16_t *)grad, (uint16_t *)room, sums, (uint16_t *)of_x, row_slopes, of_weights, (uint16_t *)of_gate_up, (uint16_t *)of_down);
    else
        Block<tiles::Float32>(*e, widest).backward((const float *)x, (const float *)grad, (float *)room, sums, (float *)of_x, row_slopes, of_weights, (float *)of_gate_up, (float *)of_down);
}
}
