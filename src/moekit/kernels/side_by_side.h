// Products of one row of x with rows that are read side by side: of four narrow matrices, or of both halves of one.
#pragma once

#include "rows.h"

namespace rows {

constexpr int SIDE = 4;

// Rows that lie in `n` places, at most SIDE. With row i is asked for row i from `ahead` on while i < inside, then from `after` on.
struct Beside {
    const uint8_t *rows[SIDE], *ahead[SIDE], *after[SIDE];
    int64_t n, stride, in, inside;
};

// Calls work(beside, o, count) for `total` rows like those of `m` from each of n places on, `count` from row o on. What is read
// `early` rows later is asked for, or with 0 some bytes later; in the end, what begins at `after`, if anything.
template <class Do>
void side_by_side(const Matrix &m, int64_t n, const uint8_t *const *from, int64_t total, int64_t early, const uint8_t *const *after, Do work) {
    Beside beside = {{}, {}, {}, n, m.stride, m.in, 0};
    for (int64_t o = 0; o < total; o += TOGETHER) {
        beside.inside = total - early - o;
        for (int64_t i = 0; i < n; i++) {
            beside.rows[i] = from[i] + o * m.stride;
            beside.ahead[i] = beside.rows[i] + (early ? early * m.stride : AHEAD / n);
            beside.after[i] = after ? after[i] - beside.inside * m.stride : beside.rows[i];
        }
        work(beside, o, std::min<int64_t>(TOGETHER, total - o));
    }
}

// Whether four blocks in bfloat16 whose second matrices have rows of `inner` numbers are read faster side by side. One after the
// other against that in us, width 512, one token from memory on two cores, where the first cache is asked (Zen 5): 64 blocks of 32
// numbers 159 and 141, 32 of 64 155 and 142, 16 of 96 106 and 106, 16 of 128 137 and 140. Where the second one is (Zen 4): 16 of 96
// 127 and 112, 12 of 128 118 and 109, 8 of 192 142 and 140, 8 of 256 137 and 137.
inline bool narrow(int64_t inner) {
    const int64_t most = moekit_cache_to_ask() == FIRST ? 64 : 128;
    return 0 < inner && inner <= most;
}

// `count` rows of each place, at most TOGETHER, of two places or SIDE, times x, to found[place][row]. `in` is a multiple of 32.
void apart(const Beside &beside, int64_t count, const uint16_t *x, float *const *found);
// The sums over SIDE places of weight * (row * that place's x), to found[row], for TOGETHER rows of each. `in` is narrow.
void added(const Beside &beside, const uint16_t *const *x, const float *weights, float *found);

}  // namespace rows
