// What the expert block is told.
#pragma once

#include <cstdint>

extern "C" {

// The rows of a routing, sorted by expert, and the experts' matrices: [2 inner, width] (gate, then up) and [width, inner].
struct moekit_experts {
    const void *const *gate_up, *const *down;  // one address for each expert
    const int64_t *bounds;                     // rows bounds[e] to bounds[e + 1] are for expert e
    const int64_t *tokens;                     // whose row it is
    const int64_t *places;                     // the rows of each token, [n_tokens, top_k]; the number of rows: none
    const float *weights;                      // of each place
    float *row_weights;                        // of each row, which `forward` leaves for `backward`; or null
    const int64_t *groups;                     // experts groups[g] to groups[g + 1] are computed before the next ones
    void *const *hidden, *const *inners;       // room for each expert's gate and up, and for half as much; or null
    int64_t n_experts, n_groups, n_tokens, top_k, width, inner;
    int64_t room_rows;                         // of any two groups that follow each other, at most
    int32_t bits, threads;
    int32_t scatters;                          // whether rows are added up as they are computed, and need no room, but `inners`
};
}
