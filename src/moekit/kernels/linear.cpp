// Products of a few rows with matrices that are read once: the speed of memory is the limit, so each thread reads one
// contiguous stream. Plain C interface; the instruction set is chosen at run time. Many rows go to the tiles.

#include "quantised.h"

namespace rows {
namespace {

constexpr int64_t UNIT = 8;     // matrix rows of which a thread's share is a multiple
constexpr int64_t PIECE = 128;  // numbers that are activated together, a multiple of every group

int best_level() {
    __builtin_cpu_init();
    const bool wide = __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
    if (wide && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni")) return 2;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") ? 1 : 0;
}

const Dot *dots(const Matrix &matrix, int level) {
    return matrix.bits == 16 ? bfloat16_dots(matrix, level) : group_dots(matrix, level);
}

// Rows [begin, end) of the matrix with all rows of x; `found` [out, n] keeps matrix rows together.
void rows_of(const Matrix &m, const Dot *dot, const Rows &x, int64_t begin, int64_t end, float *found) {
    for (int64_t o = begin; o < end; o++)
        for (int64_t first = 0; first < x.n; first += MOST) {
            const int64_t n = std::min<int64_t>(MOST, x.n - first);
            dot[n - 1](m, m.rows + o * m.stride, x, first, found + o * x.n + first);
        }
}

// A SwiGLU block on its way; where it starts in the bytes of all blocks' gate and up rows, and among their inner rows.
struct Work {
    Matrix gate_up, down;
    Rows x, inner;
    Buffer<float> both, outs;
    int64_t start, first_inner;

    int64_t bytes() const { return x.n ? gate_up.out * gate_up.stride : 0; }
};

// The rows of x that come to each block; a row is rounded once for all blocks that want it alike.
std::vector<Work> works_for(const std::vector<Block> &blocks, const float *x, int64_t width) {
    std::vector<Work> works(blocks.size());
    for (size_t b = 0; b < blocks.size(); b++) {
        Work &work = works[b];
        work.gate_up = blocks[b].gate_up, work.down = blocks[b].down;
        const int64_t n = blocks[b].n_rows, inner = work.gate_up.out / 2;
        work.x.shape(n, width, work.gate_up.bits, work.gate_up.group);
        work.inner.shape(n, inner, work.down.bits, work.down.group);
        work.both.resize(2 * inner * n), work.outs.resize(work.down.out * n);
        const Work &before = works[b ? b - 1 : 0];
        const bool alike = b && n == 1 && before.x.n == 1 && *blocks[b].tokens == *blocks[b - 1].tokens &&
                           work.x.bits == before.x.bits && work.x.group == before.x.group;
        if (alike) work.x.copy(0, before.x, 0);
        else for (int64_t r = 0; r < n; r++) work.x.put(r, x + blocks[b].tokens[r] * width, 0, width);
    }
    return works;
}

// This thread's share of gate and up rows: as many bytes as any other's, one contiguous stream in each block.
void gate_and_up(std::vector<Work> &works, int64_t bytes, int level) {
    const Span span = share(bytes, 1);
    for (Work &work : works) {
        const Matrix &m = work.gate_up;
        const auto row_at = [&](int64_t byte) {
            return std::clamp<int64_t>(rounded_up(byte - work.start, UNIT * m.stride) / m.stride, 0, m.out);
        };
        if (work.x.n) rows_of(m, dots(m, level), work.x, row_at(span.begin), row_at(span.end), work.both.data());
    }
}

// This thread's share of silu(gate) * up, group by group of the second product's input.
void activate(std::vector<Work> &works, int64_t inner_rows, int level) {
    const Span span = share(inner_rows, 1);
    for (Work &work : works) {
        const int64_t n = work.x.n, inner = work.gate_up.out / 2, pieces = (inner + PIECE - 1) / PIECE;
        const int64_t begin = std::clamp<int64_t>(span.begin - work.first_inner, 0, n * pieces);
        const int64_t end = std::clamp<int64_t>(span.end - work.first_inner, 0, n * pieces);
        Buffer<float> row(end > begin ? inner : 0), gates(PIECE), ups(PIECE);
        for (int64_t i = begin; i < end; i++) {
            const int64_t r = i / pieces, first = i % pieces * PIECE, stop = std::min(first + PIECE, inner);
            for (int64_t o = first; o < stop; o++) {
                gates[o - first] = work.both[o * n + r];
                ups[o - first] = work.both[(inner + o) * n + r];
            }
            gated(gates.data(), ups.data(), &row[first], stop - first, level);
            work.inner.put(r, row.data(), first, stop);
        }
    }
}

// This thread's columns of y.
void down(std::vector<Work> &works, const std::vector<Block> &blocks, float *y, int64_t width, int level) {
    const Span columns = share(width, UNIT);
    for (size_t b = 0; b < works.size(); b++) {
        Work &work = works[b];
        const int64_t n = work.x.n;
        rows_of(work.down, dots(work.down, level), work.inner, columns.begin, columns.end, work.outs.data());
        for (int64_t o = columns.begin; o < columns.end; o++)
            for (int64_t r = 0; r < n; r++)
                y[blocks[b].tokens[r] * width + o] += blocks[b].weights[r] * work.outs[o * n + r];
    }
}

// All blocks with few rows, in one parallel region.
void swiglu_by_rows(const std::vector<Block> &blocks, const float *x, int64_t width, float *y, int threads, int level) {
    std::vector<Work> works = works_for(blocks, x, width);
    int64_t bytes = 0, pieces = 0;
    for (Work &work : works) {
        work.start = bytes, work.first_inner = pieces;
        bytes += work.bytes(), pieces += work.x.n * ((work.gate_up.out / 2 + PIECE - 1) / PIECE);
    }
#pragma omp parallel num_threads(threads)
    {
        gate_and_up(works, bytes, level);
#pragma omp barrier
        activate(works, pieces, level);
#pragma omp barrier
        down(works, blocks, y, width, level);
    }
}

bool in_tiles(const Matrix &matrix, int64_t n, int level) { return level >= 2 && n > FEW && matrix.bits != 16; }

}  // namespace
}  // namespace rows

using namespace rows;

extern "C" {

int moekit_level() { return best_level(); }

// y[t] = matrix x[t] for n rows of float32.
void moekit_linear(const moekit_matrix *matrix, const float *x, int64_t n, float *y, int threads, int level) {
    const Matrix &m = *matrix;
    if (in_tiles(m, n, level)) return linear_in_tiles(m, x, n, y, threads);
    Rows all;
    all.shape(n, m.in, m.bits, m.group);
    for (int64_t r = 0; r < n; r++) all.put(r, x + r * m.in, 0, m.in);
    Buffer<float> found(n == 1 ? 0 : m.out * n);
#pragma omp parallel num_threads(threads)
    {
        const Span span = share(m.out, UNIT);
        rows_of(m, dots(m, level), all, span.begin, span.end, n == 1 ? y : found.data());
        for (int64_t o = span.begin; o < span.end && n > 1; o++)
            for (int64_t r = 0; r < n; r++) y[r * m.out + o] = found[o * n + r];
    }
}

// y[t] += sum over the blocks that t comes to of weight * down (silu(gate x[t]) * up x[t]).
void moekit_swiglu(const moekit_block *blocks, int64_t n_blocks, const float *x, int64_t n, int64_t width, float *y,
                   int threads, int level) {
    std::vector<Block> few, many;
    for (const Block *block = blocks; block < blocks + n_blocks; block++) {
        const bool tiled = in_tiles(block->gate_up, block->n_rows, level) && in_tiles(block->down, block->n_rows, level);
        (tiled ? many : few).push_back(*block);
    }
    if (!few.empty()) swiglu_by_rows(few, x, width, y, threads, level);
    if (!many.empty()) swiglu_in_tiles(many, x, n, width, y, threads);
}
}
