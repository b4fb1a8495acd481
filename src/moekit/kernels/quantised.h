// What the products with matrices of 8- or 4-bit groups share.
#pragma once

#include "rows.h"
#include "wide.h"

namespace rows {

inline float from_half(uint16_t half) {
    const uint32_t sign = uint32_t(half & 0x8000) << 16, rest = half & 0x7fff;
    uint32_t bits = rest >= 0x7c00 ? 0x7f800000 | ((rest & 0x3ff) << 13) : (rest << 13) + 0x38000000;
    if (rest < 0x400) {
        const float small = float(rest) / (1 << 24);
        std::memcpy(&bits, &small, 4);
    }
    bits |= sign;
    float found;
    std::memcpy(&found, &bits, 4);
    return found;
}

// The first n of 64 bytes.
inline uint64_t first_bytes(int64_t n) { return n >= 64 ? ~uint64_t(0) : (uint64_t(1) << n) - 1; }

// Rows of x for a matrix or a block up to which products of single rows of the matrix are the faster ones. Tiles against
// those in ms, 8192 x 2048, 4 bits in groups of 64, two cores: 5 rows 0.79 and 0.50, 8 rows 0.80 and 0.81, 12 rows 1.10 and
// 1.37; 8 bits: 8 rows 0.95 and 0.88, 12 rows 1.24 and 1.47.
constexpr int64_t FEW = 8;

inline bool in_tiles(const Matrix &matrix, int64_t n, int level) { return level >= 2 && n > FEW && matrix.bits != 16; }

// As moekit_linear and moekit_swiglu, in tiles that use each number for many rows of x: AVX512 with VNNI, groups alone.
void linear_in_tiles(const Matrix &matrix, const float *x, int64_t n, float *y, int threads);
void swiglu_in_tiles(const std::vector<Block> &blocks, const float *x, int64_t n, int64_t width, float *y, int threads);

}  // namespace rows
