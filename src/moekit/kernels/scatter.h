// Products whose rows are added to their tokens' sums at once. A token has many rows where experts are narrow, and then writing
// and reading these takes longer than computing them. Sums of many tokens, in a slice of the columns, wait in the caches while
// all experts' rows of these tokens are computed, one expert after the other, each in the order of its tokens.
#pragma once

#include <omp.h>
#include <utility>
#include <vector>

#include "broad.h"
#include "experts.h"

WIDE_BEGIN

namespace tiles {

constexpr int64_t SLICE = 2 * BROAD;     // columns
constexpr int64_t BLOCK_TOKENS = 4096;   // whose sums of a slice are added up at a time, at most: 2 MiB
constexpr int64_t LEAST_TOKENS = 64;     // of a block, where there are many threads
constexpr int64_t ROWS_AHEAD = 24;       // that are asked for before they are needed

// The rows of one side of a product, inner numbers each, and the matrix of each expert that they meet: [inner, width], or, where
// it is `turned`, [width, inner].
template <class Number> struct Sides {
    void *const *rows;
    const void *const *matrices;
    int64_t inner;
    bool turned;
};

// sums[tokens[r]][V * LANES] += row r times the first V vectors of a panel. A short product: its tile is leaner than others.
template <class Type, int R, int V>
void add_tile(const Word *rows, int64_t stride, const Word *panel, int64_t words, float *sums, const int64_t *tokens) {
    __m512 sum[R][V];
#pragma GCC unroll 6
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) sum[r][v] = _mm512_setzero_ps();
    // Two bases let all rows be addressed without a register for each.
    const Word *low = rows, *high = rows + R / 2 * stride;
    for (int64_t k = 0; k < words; k++, panel += BROAD) {
        __m512i b[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) b[v] = _mm512_loadu_si512(panel + v * LANES);
#pragma GCC unroll 6
        for (int r = 0; r < R; r++) {
            const __m512i own = _mm512_set1_epi32(word((r < R / 2 ? low + r * stride : high + (r - R / 2) * stride) + k));
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) sum[r][v] = Type::multiply_add(sum[r][v], own, b[v]);
        }
    }
    // One after the other, so that a token may come twice.
#pragma GCC unroll 6
    for (int r = 0; r < R; r++) {
        float *to = sums + tokens[r] * SLICE;
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) _mm512_storeu_ps(to + v * LANES, _mm512_add_ps(_mm512_loadu_ps(to + v * LANES), sum[r][v]));
    }
}

template <class Type> using AddTile = decltype(&add_tile<Type, 1, 1>);

template <class Type, int... N> constexpr std::array<AddTile<Type>, sizeof...(N)> add_tiles(std::integer_sequence<int, N...>) {
    return {add_tile<Type, N / 4 + 1, N % 4 + 1>...};
}

// All tokens' sums over their rows, which a team of threads computes together.
template <class Type> class ScatterAdd {
    using Number = typename Type::Number;
    const moekit_experts &e;
    const Sides<Number> sides;
    const int64_t words, slices, tokens_of_block, n_blocks;
    std::vector<int64_t> cuts;  // where the rows of each block begin among those of each expert, and the last one's end

  public:
    ScatterAdd(const moekit_experts &experts, const Sides<Number> &sides_)
        : e(experts), sides(sides_), words(sides.inner / Type::PER_WORD), slices((e.width + SLICE - 1) / SLICE), tokens_of_block(block_size()), n_blocks((e.n_tokens + tokens_of_block - 1) / tokens_of_block),
          cuts(e.n_experts * (n_blocks + 1)) {}

    void run(Number *out) {
        rows::Buffer<float> sums(tokens_of_block * SLICE);
        rows::Buffer<Word> panels(words * SLICE);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < e.n_experts; i++) cut(i);
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t item = 0; item < n_blocks * slices; item++) {
            const int64_t block = item / slices, first = block * tokens_of_block, n = std::min(tokens_of_block, e.n_tokens - first);
            const int64_t d = item % slices * SLICE, columns = std::min(SLICE, e.width - d);
            std::fill_n(sums.data(), n * SLICE, 0.0f);
            for (int64_t i = 0; i < e.n_experts; i++) add(i, block, d, columns, sums.data() - first * SLICE, panels.data());
            for (int64_t t = 0; t < n; t++)
                for (int64_t c = 0; c < columns; c += LANES) Type::store(out + (first + t) * e.width + d + c, _mm512_load_ps(&sums[t * SLICE + c]));
        }
    }

  private:
    // Blocks are smaller where threads would have nothing to do.
    int64_t block_size() const {
        int64_t size = BLOCK_TOKENS;
        while (size > LEAST_TOKENS && (e.n_tokens + size - 1) / size * slices < 2 * e.threads) size /= 2;
        return size;
    }

    // An expert's rows are in the order of their tokens.
    void cut(int64_t i) {
        const int64_t *at = e.tokens + e.bounds[i], *const end = e.tokens + e.bounds[i + 1];
        for (int64_t block = 0; block <= n_blocks; block++) cuts[i * (n_blocks + 1) + block] = (at = std::lower_bound(at, end, block * tokens_of_block)) - e.tokens;
    }

    int64_t cut_of(int64_t i, int64_t block) const { return cuts[i * (n_blocks + 1) + block]; }

    const Number *row(int64_t i, int64_t which) const { return (const Number *)sides.rows[i] + (which - e.bounds[i]) * sides.inner; }

    void pack(int64_t i, int64_t d, int64_t columns, Word *panels) const {
        const Number *at = (const Number *)sides.matrices[i];
        if (!sides.turned) return pack_columns<Type>({at + d, e.width, nullptr}, sides.inner, 0, columns, panels);
        for (int64_t p = 0; p < columns; p += BROAD) {
            const int64_t n = std::min<int64_t>(BROAD, columns - p);
            pack_rows<BROAD, Number>({at + (d + p) * sides.inner, sides.inner, nullptr}, n, n, words, panels + p * words);
        }
    }

    // A block's rows of expert i, in columns from d on.
    void add(int64_t i, int64_t block, int64_t d, int64_t columns, float *sums, Word *panels) const {
        static constexpr auto TILES = add_tiles<Type>(std::make_integer_sequence<int, 4 * BROAD_ROWS>());
        const int64_t begin = cut_of(i, block), n = cut_of(i, block + 1) - begin, after = std::min(i + 1, e.n_experts - 1);
        if (!n) return;
        pack(i, d, columns, panels);
        const Number *left = row(i, begin), *following = row(after, cut_of(after, block));
        in_strips(n, BROAD, [&](int64_t, int64_t r, int64_t m) {
            for (int64_t soon = r + ROWS_AHEAD; soon < r + ROWS_AHEAD + m; soon++) {
                const Number *at = soon < n ? left + soon * sides.inner : following + (soon - n) * sides.inner;
                for (int64_t k = 0; k < sides.inner; k += LINE / sizeof(Number)) ask(at + k);
            }
            for (int64_t p = 0; p < columns; p += BROAD) {
                const int64_t vectors = (std::min<int64_t>(BROAD, columns - p) + LANES - 1) / LANES;
                TILES[4 * (m - 1) + vectors - 1]((const Word *)(left + r * sides.inner), words, panels + p * words, words, sums + p, e.tokens + begin + r);
            }
        });
    }
};

}  // namespace tiles

WIDE_END
