// Products of many rows of x with matrices of 8- or 4-bit groups, and SwiGLU blocks of them, in tiles.

#include "quantised_tiles.h"
#include "wide.h"

#include <atomic>

namespace rows {
namespace {

// Hands out the numbers from 0; each thread knows its next one while it works on the present one.
class Tasks {
  public:
    explicit Tasks(int64_t n) : n(n) {}
    template <class Work> void each(Work work) {
        for (int64_t task = next++, following; task < n; task = following) {
            following = next++;
            work(task, following < n ? following : -1);
        }
    }

  private:
    const int64_t n;
    std::atomic<int64_t> next{0};
};

// Vectors are shared out evenly among as few passes as the cache allows.
int64_t pass_of(int64_t vectors) {
    const int64_t passes = std::max<int64_t>((vectors + VECTORS - 1) / VECTORS, 1);
    return (vectors + passes - 1) / passes;
}

// Calls put(row of x, first of 16 columns, their mask, numbers) for the products `out` of `rows` rows of a matrix with
// vectors [begin, end) of x.
template <class Put>
AVX512 inline void each_row(const Packed &x, int64_t begin, int64_t end, const float *out, int64_t rows, int64_t ld, Put put) {
    for (int64_t v = begin; v < end; v++)
        for (int64_t o = 0; o < rows; o += 16) {
            __m512i square[16];
            for (int64_t r = 0; r < 16; r++)
                square[r] = o + r < rows ? _mm512_loadu_si512(out + (o + r) * ld + 16 * (v - begin)) : _mm512_setzero_si512();
            wide::transpose(square);
            for (int64_t lane = 0; lane < x.held(v); lane++)
                put(16 * v + lane, o, wide::first(rows - o), _mm512_castsi512_ps(square[lane]));
        }
}

AVX512 void store(const Packed &x, int64_t begin, int64_t end, const float *out, int64_t rows, int64_t ld, float *y,
                  int64_t width) {
    each_row(x, begin, end, out, rows, ld, [=](int64_t row, int64_t o, __mmask16 mask, __m512 found) AVX512 {
        _mm512_mask_storeu_ps(y + row * width + o, mask, found);
    });
}

AVX512 void add(const Packed &x, int64_t begin, int64_t end, const float *out, int64_t rows, int64_t ld, const Block &block,
                float *y, int64_t width) {
    const int64_t *tokens = block.tokens;
    const float *weights = block.weights;
    each_row(x, begin, end, out, rows, ld, [=](int64_t row, int64_t o, __mmask16 mask, __m512 found) AVX512 {
        float *at = y + tokens[row] * width + o;
        const __m512 before = _mm512_maskz_loadu_ps(mask, at);
        _mm512_mask_storeu_ps(at, mask, _mm512_fmadd_ps(_mm512_set1_ps(weights[row]), found, before));
    });
}

Matrix part_of(const Matrix &matrix, int64_t begin, int64_t out) {
    Matrix part = matrix;
    part.rows += begin * matrix.stride, part.out = out;
    return part;
}

// A SwiGLU block on its way: `unit` rows of gate and of up make whole groups of the second product's input.
struct Work {
    Matrix gate, up, down;
    Packed x, inner;
    int64_t unit, first_task;

    explicit Work(const Block &block) {
        const Matrix &both = block.gate_up;
        gate = part_of(both, 0, both.out / 2), up = part_of(both, both.out / 2, both.out / 2), down = block.down;
        x.shape(block.n_rows, gate.in, gate.group);
        inner.shape(block.n_rows, gate.out, down.group);
        unit = std::max<int64_t>(TASK, down.group);
    }
    int64_t tasks() const { return x.n ? (gate.out + unit - 1) / unit : 0; }
};

// What a thread works in.
struct Room {
    Strip strip;
    Buffer<float> gates, ups;
};

// out[row - begin][lane] for rows [begin, end) of the matrix, strip by strip; `after` is what is read next.
void strips(const Matrix &m, int64_t begin, int64_t end, const Packed &x, int64_t v, int64_t v_end, Room &room,
            Buffer<float> &out, Ahead after) {
    const int64_t ld = 16 * (v_end - v);
    out.resize(rounded_up(end - begin, STRIP) * ld);
    for (int64_t o = begin; o < end; o += STRIP) {
        const int64_t stop = std::min(o + STRIP, end);
        Ahead ahead = after;
        if (stop < end) ahead.of(m, stop);
        room.strip.unpack(m, o, stop);
        room.strip.times(x, v, v_end, &out[(o - begin) * ld], ld, ahead);
    }
}

// The inner numbers [begin, begin + unit) of a block, as the second product wants them.
void gate_and_up(Work &work, int64_t begin, Room &room, Ahead after) {
    const int64_t end = std::min(begin + work.unit, work.gate.out), pass = pass_of(work.x.vectors), group = work.inner.group;
    for (int64_t v = 0; v < work.x.vectors; v += pass) {
        const int64_t v_end = std::min(v + pass, work.x.vectors), ld = 16 * (v_end - v);
        Ahead up;
        up.of(work.up, begin);
        strips(work.gate, begin, end, work.x, v, v_end, room, room.gates, up);
        strips(work.up, begin, end, work.x, v, v_end, room, room.ups, after);
        for (int64_t o = begin; o < end; o += group)
            for (int64_t at = v; at < v_end; at++) {
                const int64_t place = (o - begin) * ld + 16 * (at - v);
                work.inner.pack_gated(at, o / group, &room.gates[place], &room.ups[place], ld);
            }
    }
}

// Columns [begin, end) of y, from every block.
void down(const std::vector<Work> &works, const std::vector<Block> &blocks, int64_t begin, int64_t end, float *y,
          int64_t width, Room &room) {
    for (size_t b = 0; b < works.size(); b++) {
        const Work &work = works[b];
        const int64_t pass = pass_of(work.inner.vectors);
        for (int64_t v = 0; v < work.inner.vectors; v += pass) {
            const int64_t v_end = std::min(v + pass, work.inner.vectors);
            Ahead after;
            if (b + 1 < works.size()) after.of(works[b + 1].down, begin);
            strips(work.down, begin, end, work.inner, v, v_end, room, room.gates, after);
            add(work.inner, v, v_end, room.gates.data(), end - begin, 16 * (v_end - v), blocks[b], y + begin, width);
        }
    }
}

Work &work_of(std::vector<Work> &works, int64_t task) {
    const auto later = [](int64_t task, const Work &work) { return task < work.first_task; };
    return *(std::upper_bound(works.begin(), works.end(), task, later) - 1);
}

// Rows of x rounded once for each group that a block wants.
const Rows &rounded_for(int64_t group, const std::vector<Rows> &all) {
    return *std::find_if(all.begin(), all.end(), [=](const Rows &rows) { return rows.group == group; });
}

std::vector<Rows> rows_for(const std::vector<Work> &works, int64_t n, int64_t width) {
    std::vector<Rows> all;
    for (const Work &work : works) {
        const auto same = [&](const Rows &rows) { return rows.group == work.x.group; };
        if (std::any_of(all.begin(), all.end(), same)) continue;
        all.emplace_back();
        all.back().shape(n, width, 8, int32_t(work.x.group));
    }
    return all;
}

}  // namespace

void linear_in_tiles(const Matrix &matrix, const float *x, int64_t n, float *y, int threads) {
    Packed packed;
    packed.shape(n, matrix.in, matrix.group);
    const int64_t strips_ = (matrix.out + TASK - 1) / TASK, pass = pass_of(packed.vectors);
    const int64_t passes = (packed.vectors + pass - 1) / pass;
    Tasks tasks(strips_ * passes);
#pragma omp parallel num_threads(threads)
    {
        Rows some;
        some.shape(16, matrix.in, 8, matrix.group);
        const int64_t which[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#pragma omp for
        for (int64_t v = 0; v < packed.vectors; v++) {
            for (int64_t lane = 0; lane < packed.held(v); lane++) some.put(lane, x + (16 * v + lane) * matrix.in, 0, matrix.in);
            packed.pack(v, some, which);
        }
        Room room;
        tasks.each([&](int64_t task, int64_t following) {
            const int64_t o = task / passes * TASK, stop = std::min(o + TASK, matrix.out);
            const int64_t v = task % passes * pass, v_end = std::min(v + pass, packed.vectors);
            Ahead after;
            if (following >= 0) after.of(matrix, following / passes * TASK);
            strips(matrix, o, stop, packed, v, v_end, room, room.gates, after);
            store(packed, v, v_end, room.gates.data(), stop - o, 16 * (v_end - v), y + o, matrix.out);
        });
    }
}

void swiglu_in_tiles(const std::vector<Block> &blocks, const float *x, int64_t n, int64_t width, float *y, int threads) {
    std::vector<Work> works(blocks.begin(), blocks.end());
    int64_t n_tasks = 0, n_vectors = 0;
    for (Work &work : works) work.first_task = n_tasks, n_tasks += work.tasks();
    std::vector<Rows> all = rows_for(works, n, width);
    std::vector<std::pair<size_t, int64_t>> vectors;
    for (size_t b = 0; b < works.size(); b++)
        for (int64_t v = 0; v < works[b].x.vectors; v++) vectors.emplace_back(b, v);
    Tasks first(n_tasks), second((width + TASK - 1) / TASK);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for
        for (int64_t t = 0; t < n; t++)
            for (Rows &rows : all) rows.put(t, x + t * width, 0, width);
#pragma omp for schedule(dynamic, 1)
        for (size_t i = 0; i < vectors.size(); i++) {
            const auto [b, v] = vectors[i];
            works[b].x.pack(v, rounded_for(works[b].x.group, all), blocks[b].tokens + 16 * v);
        }
        Room room;
        first.each([&](int64_t task, int64_t following) {
            Work &work = work_of(works, task);
            Ahead after;
            if (following >= 0) {
                const Work &next = work_of(works, following);
                after.of(next.gate, (following - next.first_task) * next.unit);
            }
            gate_and_up(work, (task - work.first_task) * work.unit, room, after);
        });
#pragma omp barrier
        second.each([&](int64_t task, int64_t) {
            down(works, blocks, task * TASK, std::min((task + 1) * TASK, width), y, width, room);
        });
    }
}

}  // namespace rows
