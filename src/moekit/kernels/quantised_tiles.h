// Tiles of products with 8- or 4-bit groups: a few rows of the matrix times 16, 32 or 48 rows of x, which are the lanes.
#pragma once

#include "quantised.h"

namespace rows {

constexpr int64_t STRIP = 32;    // rows of a matrix that are unpacked together: 64 KB with 2048 numbers in each
constexpr int64_t TASK = 64;     // rows of a matrix that a thread takes at a time
constexpr int64_t VECTORS = 24;  // vectors of 16 rows of x for which a strip's products stay in the second cache

// Rows of x in vectors of 16, four numbers of each after each other: [vector][in / 4][16][4], and for each group
// [vector][group][16] steps and sums. The last vector has 8 lanes where 8 or fewer rows are left.
struct Packed {
    int64_t n = 0, in = 0, group = 0, groups = 0, vectors = 0;
    bool half = false;
    Buffer<int8_t> numbers;
    Buffer<float> scale, sum;

    void shape(int64_t n, int64_t in, int64_t group);
    int64_t lanes(int64_t vector) const { return half && vector == vectors - 1 ? 8 : 16; }
    int64_t held(int64_t vector) const { return std::min<int64_t>(n - 16 * vector, 16); }
    // Rows `which` of `from`, which are in the order of 8 bits, as one vector.
    void pack(int64_t vector, const Rows &from, const int64_t *which);
    // A group of silu(gate) * up, [group] rows of `ld` numbers from the vector's first lane on, rounded to 8 bits; `gate` is
    // lost.
    void pack_gated(int64_t vector, int64_t which, float *gate, const float *up, int64_t ld);
};

// What is wanted from memory next, asked for a little at a time.
struct Ahead {
    const uint8_t *at = nullptr, *end = nullptr;

    void of(const Matrix &matrix, int64_t begin) {
        at = matrix.rows + begin * matrix.stride;
        end = matrix.rows + std::min(begin + STRIP, matrix.out) * matrix.stride;
    }
    void ask(int64_t lines) {
        for (; lines > 0 && at < end; lines--, at += 64) _mm_prefetch((const char *)at, _MM_HINT_T1);
    }
    int64_t lines() const { return (end - at + 63) / 64; }
};

// Up to STRIP rows of a matrix, a byte for a number.
struct Strip {
    int64_t rows = 0, length = 0, groups = 0;
    Buffer<uint8_t> numbers;
    Buffer<float> scale, least;

    void unpack(const Matrix &matrix, int64_t begin, int64_t end);
    // out[row * ld + lane] for vectors [begin, end) of x; lane 0 is the first of vector `begin`.
    void times(const Packed &x, int64_t begin, int64_t end, float *out, int64_t ld, Ahead &ahead) const;
};

}  // namespace rows
