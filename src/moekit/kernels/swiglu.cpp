// SwiGLU blocks with few rows each, in one parallel region: as the products of linear.cpp, each thread reads streams.

#include "quantised.h"
#include "side_by_side.h"
#include "stretches.h"

namespace rows {
namespace {

constexpr int64_t OUTER = 16;  // rows of a second matrix that a thread takes at least

// A block on its way.
struct Work {
    const Block *block;
    Matrix gate, up, down;
    Some x, inner;
    float *gates, *ups, *outs;
};

Matrix part_of(const Matrix &matrix, int64_t begin, int64_t out) {
    Matrix part = matrix;
    part.rows += begin * matrix.stride, part.out = out;
    return part;
}

// What all threads share: rows of x, rounded once for neighbours that want it alike, inner rows, and room for what is found.
struct Shared {
    std::vector<Rows> rounded, inner;
    Buffer<float> room;
};

// Whether two blocks want the same row of x rounded alike.
bool alike(const Block &a, const Block &b) {
    return a.n_rows == 1 && b.n_rows == 1 && *a.tokens == *b.tokens && a.gate_up.bits == b.gate_up.bits &&
           a.gate_up.group == b.gate_up.group;
}

// Whether the inner rows of two blocks lie in one piece.
bool in_one_piece(const Matrix &a, const Matrix &b) { return a.in == b.in && a.bits == b.bits && a.group == b.group; }

int64_t gates_of(const Block &block) { return block.n_rows * rounded_up(block.gate_up.out / 2, 16); }

Shared shared_by(const std::vector<Block> &blocks, const float *x, int64_t width) {
    Shared shared;
    shared.rounded.reserve(blocks.size()), shared.inner.reserve(blocks.size());
    int64_t numbers = 0;
    for (size_t b = 0; b < blocks.size(); b++) {
        const Block &block = blocks[b];
        const int64_t n = block.n_rows;
        if (!b || !alike(block, blocks[b - 1])) {
            Rows &rounded = shared.rounded.emplace_back();
            rounded.shape(n, width, block.gate_up.bits, block.gate_up.group);
            for (int64_t r = 0; r < n; r++) rounded.put(r, x + block.tokens[r] * width, 0, width);
        }
        if (!b || !in_one_piece(block.down, blocks[b - 1].down))
            shared.inner.emplace_back().shape(0, block.down.in, block.down.bits, block.down.group);
        shared.inner.back().n += n;
        numbers += 2 * gates_of(block) + n * rounded_up(width, 16);
    }
    for (Rows &inner : shared.inner) inner.shape(inner.n, inner.in, inner.bits, inner.group);
    shared.room.resize(numbers);
    return shared;
}

// The blocks on their way. Each thread has works of its own: what one core wrote last is slow to come to another.
std::vector<Work> works_for(const std::vector<Block> &blocks, Shared &shared, int64_t width) {
    std::vector<Work> works(blocks.size());
    Rows *rounded = shared.rounded.data(), *inner = shared.inner.data();
    int64_t before = 0;  // inner rows of blocks whose inner rows lie in the same piece
    float *at = shared.room.data();
    for (size_t b = 0; b < blocks.size(); b++) {
        const Block &block = blocks[b];
        if (b && !alike(block, blocks[b - 1])) rounded++;
        if (b && !in_one_piece(block.down, blocks[b - 1].down)) inner++, before = 0;
        const int64_t n = block.n_rows, out = block.gate_up.out / 2, gates = gates_of(block);
        works[b] = {&block, part_of(block.gate_up, 0, out), part_of(block.gate_up, out, out), block.down,
                    {rounded, 0, n}, {inner, before, n}, at, at + gates, at + 2 * gates};
        before += n, at += 2 * gates + n * rounded_up(width, 16);
    }
    return works;
}

// Works that are done together: one, or SIDE whose matrices are read side by side, which leave the sum of their outputs
// to the first. A unit is a part of the inner rows that makes whole groups of the second product's input; `first` is the
// team's first unit among those of all teams.
struct Team {
    Work *works;
    int64_t n, unit, first;

    int64_t inner() const { return works->gate.out; }
    int64_t units() const { return works->x.n ? rounded_up(inner(), unit) / unit : 0; }
};

// Whether SIDE works from this one on are a team.
bool are_team(const Work *works, int level) {
    const Matrix &gate = works->gate, &down = works->down;
    if (!in_vectors(gate, level) || !in_vectors(down, level) || !narrow(down.in)) return false;
    return std::all_of(works + 1, works + SIDE, [&](const Work &work) {
        return alike(*works->block, *work.block) && in_one_piece(down, work.down) && gate.stride == work.gate.stride &&
               down.stride == work.down.stride;
    });
}

std::vector<Team> teams_of(std::vector<Work> &works, int level) {
    std::vector<Team> teams;
    teams.reserve(works.size());
    int64_t units = 0;
    for (size_t b = 0; b < works.size(); b += teams.back().n) {
        const int64_t n = b + SIDE <= works.size() && are_team(&works[b], level) ? SIDE : 1;
        teams.push_back({&works[b], n, std::max<int64_t>(works[b].inner.rows->group, 32), units});
        units += teams.back().units();
    }
    return teams;
}

// Where rows of a team's matrices lie; of none if n is 0.
struct Place {
    const uint8_t *rows[SIDE];
    int64_t n;
};

Place place_of(const Team &team, const Matrix Work::*matrix, int64_t row) {
    Place place = {{}, team.n};
    for (int64_t m = 0; m < team.n; m++) place.rows[m] = (team.works[m].*matrix).rows + row * (team.works[m].*matrix).stride;
    return place;
}

// What SIDE matrices ask for in the end, where as many come after them.
const uint8_t *const *then(const Place &after) { return after.n == SIDE ? after.rows : nullptr; }

// Rows [begin, end) of the team's first matrices; as rows_of.
void first_rows(const Team &team, const Matrix Work::*matrix, float *Work::*found, int64_t begin, int64_t end, const Place &after, int level) {
    const Work *works = team.works;
    const Matrix &m = works->*matrix;
    if (team.n == 1) return rows_of(m, level, works->x, begin, end, after.rows[0], works->*found + begin, team.inner());
    const uint16_t *x = &works->x.rows->wide[works->x.first * m.in];
    const Place from = place_of(team, matrix, begin);
    side_by_side(m, SIDE, from.rows, end - begin, AHEAD / SIDE / m.stride, then(after), [&](const Beside &beside, int64_t o, int64_t count) {
        float *to[SIDE];
        for (int i = 0; i < SIDE; i++) to[i] = works[i].*found + begin + o;
        apart(beside, count, x, to);
    });
}

// Rows [begin, end) of the team's second matrices; as rows_of.
void second_rows(const Team &team, int64_t begin, int64_t end, const Place &after, int64_t width, int level) {
    const Work *works = team.works;
    if (team.n == 1) return rows_of(works->down, level, works->inner, begin, end, after.rows[0], works->outs + begin, width);
    const uint16_t *x[SIDE];
    float weights[SIDE];
    for (int i = 0; i < SIDE; i++) {
        x[i] = &works[i].inner.rows->wide[works[i].inner.first * works[i].down.in];
        weights[i] = *works[i].block->weights;
    }
    // The width is a multiple of 32: all stretches have TOGETHER rows.
    const Place from = place_of(team, &Work::down, begin);
    side_by_side(works->down, SIDE, from.rows, end - begin, TOGETHER, then(after), [&](const Beside &beside, int64_t o, int64_t) {
        added(beside, x, weights, works->outs + begin + o);
    });
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

// The inner numbers of the units of `span`, team by team.
void gate_and_up(const std::vector<Team> &teams, Span span, const Place &after, int level) {
    for (const Team &team : teams) {
        const int64_t first = std::max(span.begin, team.first), last = std::min(span.end, team.first + team.units());
        if (first >= last) continue;
        const int64_t begin = (first - team.first) * team.unit;
        const int64_t end = std::min((last - team.first) * team.unit, team.inner());
        const Team *next = &team + 1;
        while (next < teams.data() + teams.size() && !next->units()) next++;
        const Place then = last < span.end ? place_of(*next, &Work::gate, 0) : after;
        first_rows(team, &Work::gate, &Work::gates, begin, end, place_of(team, &Work::up, begin), level);
        first_rows(team, &Work::up, &Work::ups, begin, end, then, level);
        for (int64_t i = 0; i < team.n; i++) activate(team.works[i], begin, end, level);
    }
}

// Rows of the second matrices, in stretches of OUTER; `span` counts those of all teams, one after the other.
void down(const std::vector<Team> &teams, Span span, const Place &after, int64_t width, int level) {
    const int64_t each = rounded_up(width, OUTER) / OUTER;
    for (int64_t t = span.begin / each; t * each < span.end; t++) {
        const int64_t first = std::max(span.begin - t * each, int64_t(0)), last = std::min(span.end - t * each, each);
        const Place then = last < span.end - t * each ? place_of(teams[t + 1], &Work::down, 0) : after;
        second_rows(teams[t], first * OUTER, std::min(last * OUTER, width), then, width, level);
    }
}

// y += what the teams found for it, in their order whatever the threads.
void combine(const std::vector<Team> &teams, Span columns, float *y, int64_t width) {
    for (const Team &team : teams) {
        const Work &work = *team.works;
        for (int64_t r = 0; r < work.x.n; r++) {
            const float weight = team.n == 1 ? work.block->weights[r] : 1, *found = work.outs + r * width;
            float *to = y + work.block->tokens[r] * width;
            for (int64_t o = columns.begin; o < columns.end; o++) to[o] += weight * found[o];
        }
    }
}

// What threads have taken of the units of first and second matrices.
struct Taken {
    std::atomic<int64_t> inner{0}, outer{0};
};

// One thread's part, in a parallel region.
void take_part(const std::vector<Block> &blocks, Shared &shared, Taken &taken, int64_t width, float *y, int level) {
    std::vector<Work> works = works_for(blocks, shared, width);
    const std::vector<Team> teams = teams_of(works, level);
    const int64_t each = rounded_up(width, OUTER) / OUTER;
    const int threads = omp_get_num_threads();
    Turns inner(taken.inner, teams.back().first + teams.back().units(), threads);
    Turns outer(taken.outer, each * int64_t(teams.size()), threads);
    const auto gate_at = [&](int64_t which) {
        const Team *team = &teams.back();
        while (which < team->first) team--;
        return place_of(*team, &Work::gate, (which - team->first) * team->unit);
    };
    const auto down_at = [&](const Span &span) {
        return any(span) ? place_of(teams[span.begin / each], &Work::down, span.begin % each * OUTER) : Place{};
    };
    const Span first = outer.next();
    in_turn(inner, inner.next(), [&](Span span, Span following) {
        gate_and_up(teams, span, any(following) ? gate_at(following.begin) : down_at(first), level);
    });
#pragma omp barrier
    in_turn(outer, first, [&](Span span, Span following) { down(teams, span, down_at(following), width, level); });
#pragma omp barrier
    const int64_t part = rounded_up(rounded_up(width, threads) / threads, 16);
    const int64_t begin = std::min(omp_get_thread_num() * part, width);
    combine(teams, {begin, std::min(begin + part, width)}, y, width);
}

void swiglu_by_rows(const std::vector<Block> &blocks, const float *x, int64_t width, float *y, int threads, int level) {
    Shared shared = shared_by(blocks, x, width);
    Taken taken;
#pragma omp parallel num_threads(threads)
    take_part(blocks, shared, taken, width, y, level);
}

}  // namespace
}  // namespace rows

using namespace rows;

extern "C" {

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
