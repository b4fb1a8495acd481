// What the products with stored matrices share: matrices, rows of activations, and the shares of threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <immintrin.h>
#include <omp.h>

#include "caches.h"
#include "lines.h"

#define AVX2 __attribute__((target("avx2,fma,f16c")))
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,avx2,fma,f16c")))

extern "C" {

// bits: 16 is bfloat16; 8 and 4 are numbers in groups. Rows are `stride` bytes apart.
struct moekit_matrix {
    const uint8_t *rows;
    int64_t out, in, stride;
    int32_t bits, group;
};

// One SwiGLU block and those rows of x that come to it.
struct moekit_block {
    moekit_matrix gate_up, down;
    const int64_t *tokens;   // which row of x each of its rows is
    const float *weights;    // the factor of each
    int64_t n_rows;
};
}

namespace rows {

using Matrix = moekit_matrix;
using Block = moekit_block;

constexpr int MOST = 8;          // rows of x that share one pass over a matrix
constexpr int TOGETHER = 16;     // rows of a matrix whose products are summed up and stored together
constexpr int64_t SHORT = 256;   // numbers of a bfloat16 row up to which a row of x stays in registers
constexpr int64_t AHEAD = 4096;  // bytes that are asked for before they are needed

inline int64_t rounded_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Whether the rows of a matrix are whole vectors of bfloat16 for AVX512.
inline bool in_vectors(const Matrix &m, int level) { return level >= 2 && m.bits == 16 && m.in % 32 == 0; }

inline float from_bf16(uint16_t value) {
    uint32_t bits = uint32_t(value) << 16;
    float found;
    std::memcpy(&found, &bits, 4);
    return found;
}

inline uint16_t to_bf16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t((bits >> 16) | 0x40);
    return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Rows of x as a matrix wants them: bfloat16, or 8-bit numbers with a step and a sum for each group. Rows of numbers are
// padded with zeros to whole blocks of 128, and their groups to 16. With 4 bits a block lies as the bytes of a row do
// when they are split: first what meets the low halves of 64 bytes, then what meets the high halves.
struct Rows {
    int64_t n = 0, in = 0, length = 0, groups = 0;
    int32_t bits = 16, group = 0;
    Buffer<uint16_t> wide;
    Buffer<int8_t> narrow;
    Buffer<float> scale, sum;

    void shape(int64_t n_, int64_t in_, int32_t bits_, int32_t group_);
    // Numbers [begin, end) of one row; begin and end are multiples of the group.
    void put(int64_t row, const float *x, int64_t begin, int64_t end);
};

// `count` rows of a matrix, at most TOGETHER from `row` on, times n rows of x from `first` on, to found[row of x * apart + i].
// As many bytes from `ahead` on, which lie as the rows do, are asked for.
using Dot = void (*)(const Matrix &, const uint8_t *row, int64_t count, const uint8_t *ahead, const Rows &x, int64_t first,
                     float *found, int64_t apart);

// A Dot of products with one row of the matrix each.
using DotOfOne = void (*)(const Matrix &, const uint8_t *row, const uint8_t *ahead, const Rows &x, int64_t first, float *found,
                          int64_t apart);
template <DotOfOne ONE>
void each(const Matrix &m, const uint8_t *row, int64_t count, const uint8_t *ahead, const Rows &x, int64_t first, float *found,
          int64_t apart) {
    for (int64_t i = 0; i < count; i++) ONE(m, row + i * m.stride, ahead + i * m.stride, x, first, found + i, apart);
}

// The products for 1 to MOST rows of x.
const Dot *bfloat16_dots(const Matrix &matrix, int level);
const Dot *group_dots(const Matrix &matrix, int level);

inline float silu(float gate) { return gate / (1 + __builtin_expf(-gate)); }
// inner[i] = silu(gate[i]) * up[i]
void gated(const float *gate, const float *up, float *inner, int64_t n, int level);

struct Span { int64_t begin, end; };

}  // namespace rows
