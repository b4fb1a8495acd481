// Products of one row of x with rows of four narrow matrices that are read side by side.
#pragma once

#include "rows.h"

namespace rows {

constexpr int SIDE = 4;

// Rows of four matrices. With row i is asked for row i from `ahead` on while i < inside, then from `after` on.
struct Four {
    const uint8_t *rows[SIDE], *ahead[SIDE], *after[SIDE];
    int64_t stride, in, inside;
};

// Whether four blocks in bfloat16 whose second matrices have rows of `inner` numbers are read faster side by side. One after the
// other against that in us, width 512, one token from memory on two cores, where the first cache is asked (Zen 5): 64 blocks of 32
// numbers 159 and 141, 32 of 64 155 and 142, 16 of 96 106 and 106, 16 of 128 137 and 140. Where the second one is (Zen 4): 16 of 96
// 127 and 112, 12 of 128 118 and 109, 8 of 192 142 and 140, 8 of 256 137 and 137.
inline bool narrow(int64_t inner) {
    const int64_t most = moekit_cache_to_ask() == FIRST ? 64 : 128;
    return inner % 32 == 0 && 0 < inner && inner <= most;
}

// `count` rows of each, at most TOGETHER, times x, to found[matrix][row]. `in` is a multiple of 32.
void four_apart(const Four &four, int64_t count, const uint16_t *x, float *const *found);
// The sums over the four of weight * (row * that matrix's x), to found[row], for TOGETHER rows of each. `in` is narrow.
void four_added(const Four &four, const uint16_t *const *x, const float *weights, float *found);

}  // namespace rows
