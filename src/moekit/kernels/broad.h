// Products with broad panels for AVX512: rows, or the columns of another panel, times a panel of four vectors, straight to where
// they go. The inner dimension runs along the rows of the matrix that a panel is packed from, so that it is not transposed.
#pragma once

#include <array>
#include <type_traits>
#include <utility>

#include "tiles.h"

WIDE_BEGIN

namespace tiles {

constexpr int BROAD = 4 * LANES;  // columns of a broad panel: whole cache lines of any type
constexpr int BROAD_ROWS = 6;     // rows of its tiles: 24 sums, 4 columns and one factor
constexpr int TALL_ROWS = 12;     // and of those with half as many columns, or fewer: products need as many sums to follow each other
constexpr int64_t PAIR = 2 * LINE;

inline int64_t rows_of_tiles(int64_t columns) { return columns > BROAD / 2 ? BROAD_ROWS : TALL_ROWS; }

// The first factor of a broad product: rows that lie `stride` words apart, one after the other or those that `which` names,
struct Left {
    const Word *at;
    int64_t stride;
    const int64_t *which;
};

// or the columns of a broad panel.
struct Columns {
    const Word *at;
};

// A word of each of R rows after the other.
template <int R> struct Factors {
    const Word *rows[R];
    int64_t k = 0;
    explicit Factors(const Left &a) {
        for (int r = 0; r < R; r++) rows[r] = a.at + (a.which ? a.which[r] : r) * a.stride;
    }
    int take(int r) const { return word(rows[r] + k); }
    void go_on() { k++; }
};

template <int R> struct FactorsOfColumns {
    const Word *at;
    explicit FactorsOfColumns(const Columns &a) : at(a.at) {}
    int take(int r) const { return word(at + r); }
    void go_on() { at += BROAD; }
};

template <int R> Factors<R> factors(const Left &a) { return Factors<R>(a); }
template <int R> FactorsOfColumns<R> factors(const Columns &a) { return FactorsOfColumns<R>(a); }

// Broad panels of `width` columns, beginning at column `from`, of n rows, which run along the inner dimension.
template <class Type>
void pack_columns(const Rows<typename Type::Number> &x, int64_t n, int64_t from, int64_t width, Word *panels) {
    const int64_t words = up_to(n, Type::PER_WORD) / Type::PER_WORD;
    for (int64_t k = 0; k < words; k++) {
        const int64_t row = k * Type::PER_WORD;
        const auto *a = x.row(row) + from;
        const auto *b = Type::PER_WORD == 2 && row + 1 < n ? x.row(row + 1) + from : nullptr;
        const auto *next = x.row(std::min(row + 4 * Type::PER_WORD, n - 1)) + from, *after = x.row(std::min(row + 4 * Type::PER_WORD + 1, n - 1)) + from;
        for (int64_t c = 0; c < width; c += 2 * LANES) {
            ask(next + c);
            if (Type::PER_WORD == 2) ask(after + c);
            Word *to = panels + c / BROAD * words * BROAD + k * BROAD + c % BROAD;
            __m512i first, second;
            if (width - c > LANES) {
                Type::two_words(a + c, b ? b + c : nullptr, first, second);
                _mm512_storeu_si512(to, first);
                _mm512_storeu_si512(to + LANES, second);
            } else _mm512_storeu_si512(to, Type::words(a + c, b ? b + c : nullptr));
        }
    }
}

// What is asked for during a product: lines that lie `apart` bytes from one to the next, `rate` / 2^32 of one for each word of
// the inner dimension.
struct Asked {
    const char *at;
    int64_t apart;
    uint32_t rate = 0, part = 0;
    void go_on() {
        _mm_prefetch(at, _MM_HINT_T1);
        at += __builtin_add_overflow(part, rate, &part) ? apart : 0;
    }
};

// The lines of the broad panel that is packed next, as the strips of the product before it ask for them: its numbers lie in rows
// `stride` bytes apart. Lines are fetched in pairs, and panels may begin amid one: then what is asked for lies half a panel
// further. Strips ask for alike many lines: asking for more than memory gives would hold up the products.
template <class Number> struct NextPanel {
    static constexpr int64_t OF_A_ROW = BROAD * sizeof(Number) / LINE;
    const char *pair;
    int64_t apart, in_row, count, of_a_turn;
    uint32_t rate;

    // During a product in so many strips with `words` of the inner dimension.
    NextPanel(const Number *panel, int64_t stride, int64_t rows, int64_t strips, int64_t words) : pair((const char *)up_to((uintptr_t)panel, PAIR)) {
        // Where each row begins elsewhere in a pair, one line comes after the other, and with it what is next in its row.
        const bool all = stride % PAIR;
        apart = all ? LINE : stride, in_row = all ? 1 : OF_A_ROW, count = all ? rows * stride / LINE : rows;
        const int64_t turns = std::max<int64_t>(1, strips / in_row);
        of_a_turn = (count + turns - 1) / turns;
        rate = uint32_t(std::min<int64_t>(UINT32_MAX, (of_a_turn << 32) / words));
    }

    Asked of_strip(int64_t s) const {
        const int64_t first = (in_row == 1 ? s : s / OF_A_ROW) * of_a_turn, line = in_row == 1 ? 0 : s % OF_A_ROW;
        return first < count ? Asked{pair + first * apart + line * LINE, apart, rate} : Asked{pair, 0};
    }
};

// A broad panel. Where `from` is given, it is packed now, from a matrix whose rows run along the inner dimension, for those
// who need it later.
template <class Number> struct Panel {
    Word *at;
    const Number *from = nullptr;
    int64_t stride = 0;
};

// The first V vectors of a word of a broad panel, from the rows of a matrix that lie there. Rows that are met soon are asked for.
template <class Type, int V>
inline void take_words(const typename Type::Number *row, int64_t stride, __m512i (&found)[V]) {
    constexpr int64_t NUMBERS = LINE / sizeof(*row);
    const auto *other = row + (Type::PER_WORD - 1) * stride, *soon = row + 4 * Type::PER_WORD * stride;
#pragma GCC unroll 4
    for (int64_t c = 0; c < V * LANES; c += NUMBERS) {
        ask(soon + c);
        if (Type::PER_WORD == 2) ask(soon + stride + c);
    }
#pragma GCC unroll 2
    for (int v = 0; v + 1 < V; v += 2) Type::two_words(row + v * LANES, other + v * LANES, found[v], found[v + 1]);
    if (V % 2) found[V - 1] = Type::words(row + (V - 1) * LANES, other + (V - 1) * LANES);
}

// to[R][V * LANES] = rows of `a` times the first V vectors of a broad panel. What is asked for comes by reference: as a value it
// would be copied, and reading what was written a moment ago in halves waits for all that was written before.
template <class Type, class Out, class First, bool PACKS, bool ALSO, int R, int V>
void broad_tile(const First &a, const Panel<typename Type::Number> &panel, int64_t words, const Target<typename Out::Number> &to, const Asked &asked, Elsewhere also) {
    __m512 sum[R][V];
#pragma GCC unroll 12
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) sum[r][v] = _mm512_setzero_ps();
    auto factor = factors<R>(a);
    Asked next = asked;
    Word *column = panel.at;
    const auto *from = panel.from;
    for (int64_t k = 0; k < words; k++, column += BROAD, factor.go_on()) {
        __m512i b[V];
        if (PACKS) take_words<Type, V>(from, panel.stride, b), from += Type::PER_WORD * panel.stride;
#pragma GCC unroll 4
        for (int v = 0; v < V; v++)
            if (PACKS) _mm512_storeu_si512(column + v * LANES, b[v]);
            else b[v] = _mm512_loadu_si512(column + v * LANES);
        if (std::is_same_v<First, Left>) next.go_on();
        if (ALSO) ask(also[k / EVERY]);
#pragma GCC unroll 12
        for (int r = 0; r < R; r++) {
            const __m512i own = _mm512_set1_epi32(factor.take(r));
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) sum[r][v] = Type::multiply_add(sum[r][v], own, b[v]);
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) Out::template store<V>(to.at + r * to.stride, sum[r], to.past_caches);
}

template <class Type, class Out, class First> using BroadTile = decltype(&broad_tile<Type, Out, First, false, false, 1, 1>);

template <class Type, class Out, class First, bool PACKS, bool ALSO, int... N>
constexpr std::array<BroadTile<Type, Out, First>, sizeof...(N)> broad_tiles(std::integer_sequence<int, N...>) {
    return {broad_tile<Type, Out, First, PACKS, ALSO, std::min(N / 4 + 1, N % 4 < 2 ? TALL_ROWS : BROAD_ROWS), N % 4 + 1>...};
}

// to[n][..] = n rows of `a`, as many as `rows_of_tiles` at most, times the first `columns` columns of a broad panel.
template <class Type, class Out, class First>
void broad(const First &a, int64_t n, const Panel<typename Type::Number> &panel, int64_t words, int64_t columns, const Target<typename Out::Number> &to, const Asked &asked, Elsewhere also) {
    constexpr auto ALL = std::make_integer_sequence<int, 4 * TALL_ROWS>();
    constexpr bool PACKS = std::is_same_v<First, Left>;
    static constexpr decltype(broad_tiles<Type, Out, First, false, false>(ALL)) TILES[] = {
        broad_tiles<Type, Out, First, false, false>(ALL), broad_tiles<Type, Out, First, false, true>(ALL), broad_tiles<Type, Out, First, PACKS, false>(ALL), broad_tiles<Type, Out, First, PACKS, true>(ALL)};
    const int64_t which = 4 * (n - 1) + (std::min<int64_t>(columns, BROAD) + LANES - 1) / LANES - 1;
    TILES[2 * (panel.from != nullptr) + (also != nullptr)][which](a, panel, words, to, asked, also);
}

inline int64_t strips_of(int64_t rows, int64_t columns) { return (rows + rows_of_tiles(columns) - 1) / rows_of_tiles(columns); }

// each(s, begin, n) for strip s of `rows` rows that meet `columns` columns: n of them, nearly alike in all strips.
template <class Each> void in_strips(int64_t rows, int64_t columns, Each each) {
    const int64_t strips = strips_of(rows, columns);
    for (int64_t s = 0; s < strips; s++) each(s, s * rows / strips, (s + 1) * rows / strips - s * rows / strips);
}

}  // namespace tiles

WIDE_END
