// Products of a few rows with matrices that are read once: the speed of memory is the limit, so each thread reads one
// contiguous stream. Plain C interface; the instruction set is chosen at run time. Many rows go to the tiles.

#include "quantised.h"

#include <atomic>

namespace rows {
namespace {

constexpr int64_t LEAST = 16384;  // bytes of a matrix below which a thread takes no part of its own
constexpr int64_t OUTER = 16;     // rows of a second matrix that a thread takes at least

int best_level() {
    __builtin_cpu_init();
    const bool wide = __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
    if (wide && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni")) return 2;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") ? 1 : 0;
}

const Dot *dots(const Matrix &matrix, int level) {
    return matrix.bits == 16 ? bfloat16_dots(matrix, level) : group_dots(matrix, level);
}

// n rows from the first on.
struct Some {
    Rows *rows;
    int64_t first, n;
};

// Rows [begin, end) of the matrix with some rows of x, to found[row of x * apart + o - begin]. What is read `early` rows
// later is asked for now: memory must not rest between one stretch of rows and the next, which begins at `after`.
void rows_of(const Matrix &m, int level, const Some &x, int64_t begin, int64_t end, const uint8_t *after, float *found,
             int64_t apart) {
    const Dot *dot = dots(m, level);
    const int64_t length = std::max<int64_t>(m.stride, 1), bytes = m.bits == 16 ? FAR_AHEAD : AHEAD;
    const int64_t early = std::max<int64_t>(rounded_up(bytes, length) / length, 1);
    for (int64_t o = begin, stop; o < end; o = stop) {
        const uint8_t *row = m.rows + o * m.stride, *ahead = row + early * m.stride;
        if (o + early >= end) ahead = after ? after + (o + early - end) * m.stride : row;
        stop = std::min(o + TOGETHER, o + early < end ? end - early : end);
        for (int64_t first = 0; first < x.n; first += MOST) {
            const int64_t n = std::min<int64_t>(MOST, x.n - first);
            dot[n - 1](m, row, stop - o, ahead, *x.rows, x.first + first, found + first * apart + o - begin, apart);
        }
    }
}

// Hands out stretches of the units [0, total) to threads as they come: long ones first, for memory likes long streams,
// and short ones in the end, so that no thread waits long for another.
class Turns {
  public:
    Turns(int64_t total, int threads) : total(total), parts(2 * std::max(threads, 1)) {}
    Span next() {
        int64_t begin = taken, end;
        do end = begin + std::max<int64_t>((total - begin) / parts, 1);
        while (begin < total && !taken.compare_exchange_weak(begin, end));
        return begin < total ? Span{begin, end} : Span{total, total};
    }

  private:
    const int64_t total, parts;
    std::atomic<int64_t> taken{0};
};

inline bool any(const Span &span) { return span.begin < span.end; }

// A SwiGLU block on its way. A unit is a part of its inner rows that makes whole groups of the second product's input;
// `first` is the block's first unit among those of all blocks.
struct Work {
    const Block *block;
    Matrix gate, up, down;
    Some x, inner;
    float *gates, *ups, *outs;
    int64_t unit, first;

    int64_t units() const { return x.n ? rounded_up(gate.out, unit) / unit : 0; }
    const uint8_t *gate_at(int64_t which) const { return gate.rows + (which - first) * unit * gate.stride; }
};

Matrix part_of(const Matrix &matrix, int64_t begin, int64_t out) {
    Matrix part = matrix;
    part.rows += begin * matrix.stride, part.out = out;
    return part;
}

// All blocks on their way, and what they have room in: what they find, and the rows of x that come to them.
struct Works {
    std::vector<Work> each;
    std::vector<Rows> rounded, inner;
    Buffer<float> room;
};

// Whether two blocks want the same row of x rounded alike.
bool alike(const Block &a, const Block &b) {
    return a.n_rows == 1 && b.n_rows == 1 && *a.tokens == *b.tokens && a.gate_up.bits == b.gate_up.bits &&
           a.gate_up.group == b.gate_up.group;
}

// Whether the inner rows of two blocks lie in one piece.
bool side_by_side(const Matrix &a, const Matrix &b) { return a.in == b.in && a.bits == b.bits && a.group == b.group; }

// What works on the blocks will share: rows of x, rounded once for neighbours that want it alike, and inner rows.
void shape_rows(Works &works, const std::vector<Block> &blocks, const float *x, int64_t width) {
    works.rounded.reserve(blocks.size()), works.inner.reserve(blocks.size());
    for (size_t b = 0; b < blocks.size(); b++) {
        const Block &block = blocks[b];
        const int64_t n = block.n_rows;
        if (!b || !alike(block, blocks[b - 1])) {
            Rows &rounded = works.rounded.emplace_back();
            rounded.shape(n, width, block.gate_up.bits, block.gate_up.group);
            for (int64_t r = 0; r < n; r++) rounded.put(r, x + block.tokens[r] * width, 0, width);
        }
        if (!b || !side_by_side(block.down, blocks[b - 1].down))
            works.inner.emplace_back().shape(0, block.down.in, block.down.bits, block.down.group);
        works.each[b].x = {&works.rounded.back(), 0, n};
        works.each[b].inner = {&works.inner.back(), works.inner.back().n, n};
        works.inner.back().n += n;
    }
    for (Rows &inner : works.inner) inner.shape(inner.n, inner.in, inner.bits, inner.group);
}

Works works_for(const std::vector<Block> &blocks, const float *x, int64_t width) {
    Works works = {std::vector<Work>(blocks.size()), {}, {}, {}};
    shape_rows(works, blocks, x, width);
    int64_t units = 0, numbers = 0;
    for (size_t b = 0; b < blocks.size(); b++) {
        const Block &block = blocks[b];
        const int64_t inner = block.gate_up.out / 2;
        Work &work = works.each[b];
        work.block = &block;
        work.gate = part_of(block.gate_up, 0, inner), work.up = part_of(block.gate_up, inner, inner), work.down = block.down;
        work.unit = std::max<int64_t>(work.inner.rows->group, 32), work.first = units;
        units += work.units(), numbers += block.n_rows * (2 * rounded_up(inner, 16) + rounded_up(width, 16));
    }
    works.room.resize(numbers);
    float *at = works.room.data();
    for (Work &work : works.each) {
        const int64_t n = work.x.n, gates = n * rounded_up(work.gate.out, 16);
        work.gates = at, work.ups = at + gates, work.outs = at + 2 * gates;
        at += 2 * gates + n * rounded_up(width, 16);
    }
    return works;
}

// silu(gate) * up for inner numbers [begin, end), rounded for the second product; gates are lost.
void activate(Work &work, int64_t begin, int64_t end, int level) {
    const int64_t inner = work.gate.out;
    for (int64_t r = 0; r < work.x.n; r++) {
        float *gates = work.gates + r * inner;
        gated(gates + begin, work.ups + r * inner + begin, gates + begin, end - begin, level);
        work.inner.rows->put(work.inner.first + r, gates, begin, end);
    }
}

// The inner numbers of the units of `span`, block by block.
void gate_and_up(std::vector<Work> &works, Span span, const uint8_t *after, int level) {
    for (Work &work : works) {
        const int64_t first = std::max(span.begin, work.first), last = std::min(span.end, work.first + work.units());
        if (first >= last) continue;
        const int64_t begin = (first - work.first) * work.unit;
        const int64_t end = std::min((last - work.first) * work.unit, work.gate.out);
        const Work *next = &work + 1;
        while (next < works.data() + works.size() && !next->units()) next++;
        const uint8_t *then = last < span.end ? next->gate.rows : after;
        const int64_t inner = work.gate.out;
        rows_of(work.gate, level, work.x, begin, end, work.up.rows + begin * work.up.stride, work.gates + begin, inner);
        rows_of(work.up, level, work.x, begin, end, then, work.ups + begin, inner);
        activate(work, begin, end, level);
    }
}

// Rows of the second matrices, in stretches of OUTER; `span` counts those of all blocks, one after the other.
void down(std::vector<Work> &works, Span span, const uint8_t *after, int64_t width, int level) {
    const int64_t each = rounded_up(width, OUTER) / OUTER;
    for (int64_t b = span.begin / each; b * each < span.end; b++) {
        Work &work = works[b];
        const int64_t first = std::max(span.begin - b * each, int64_t(0)), last = std::min(span.end - b * each, each);
        const uint8_t *then = last < span.end - b * each ? works[b + 1].down.rows : after;
        rows_of(work.down, level, work.inner, first * OUTER, std::min(last * OUTER, width), then, work.outs + first * OUTER, width);
    }
}

// y += what the blocks found for it, in their order whatever the threads.
void combine(const std::vector<Work> &works, Span columns, float *y, int64_t width) {
    for (const Work &work : works)
        for (int64_t r = 0; r < work.x.n; r++) {
            const float weight = work.block->weights[r], *found = work.outs + r * width;
            float *to = y + work.block->tokens[r] * width;
            for (int64_t o = columns.begin; o < columns.end; o++) to[o] += weight * found[o];
        }
}

// Calls work(span, the span after it) for the spans that this thread gets, of which `span` is the first.
template <class Do> void in_turn(Turns &turns, Span span, Do work) {
    while (any(span)) {
        const Span following = turns.next();
        work(span, following);
        span = following;
    }
}

// All blocks with few rows, in one parallel region.
void swiglu_by_rows(const std::vector<Block> &blocks, const float *x, int64_t width, float *y, int threads, int level) {
    Works all = works_for(blocks, x, width);
    std::vector<Work> &works = all.each;
    const int64_t units = works.back().first + works.back().units(), each = rounded_up(width, OUTER) / OUTER;
    Turns inner(units, threads), outer(each * int64_t(works.size()), threads);
    const auto gate_at = [&](int64_t which) {
        const Work *work = &works.back();
        while (which < work->first) work--;
        return work->gate_at(which);
    };
    const auto down_at = [&](const Span &span) {
        const Matrix &m = works[std::min(span.begin / each, int64_t(works.size()) - 1)].down;
        return any(span) ? m.rows + span.begin % each * OUTER * m.stride : nullptr;
    };
#pragma omp parallel num_threads(threads)
    {
        const Span first = outer.next();
        in_turn(inner, inner.next(), [&](Span span, Span following) {
            gate_and_up(works, span, any(following) ? gate_at(following.begin) : down_at(first), level);
        });
#pragma omp barrier
        in_turn(outer, first, [&](Span span, Span following) { down(works, span, down_at(following), width, level); });
#pragma omp barrier
        const int64_t part = rounded_up(rounded_up(width, omp_get_num_threads()) / omp_get_num_threads(), 16);
        const int64_t begin = std::min(omp_get_thread_num() * part, width);
        combine(works, {begin, std::min(begin + part, width)}, y, width);
    }
}

bool in_tiles(const Matrix &matrix, int64_t n, int level) { return level >= 2 && n > FEW && matrix.bits != 16; }

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
    Turns turns(final.first + final.units, threads);
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

}  // namespace
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

// y[t] += sum over the blocks that t comes to of weight * down (silu(gate x[t]) * up x[t]).
void moekit_swiglu(const moekit_block *blocks, int64_t n_blocks, const float *x, int64_t n, int64_t width, float *y,
                   int threads, int level) {
    std::vector<Block> few, many;
    few.reserve(n_blocks);
    for (const Block *block = blocks; block < blocks + n_blocks; block++) {
        const bool tiled = in_tiles(block->gate_up, block->n_rows, level) && in_tiles(block->down, block->n_rows, level);
        (tiled ? many : few).push_back(*block);
    }
    if (!few.empty()) swiglu_by_rows(few, x, width, y, threads, level);
    if (!many.empty()) swiglu_in_tiles(many, x, n, width, y, threads);
}
}
