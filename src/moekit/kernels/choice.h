// How one token's experts follow from its logits: scores, choice and weights (arXiv 2401.06066, eqs 9-11; 2405.04434, eqs
// 20-22; 2412.19437, eqs 12-16).
#pragma once

#include "token.h"

namespace choice {

using Choice = moekit_choice;

enum Score { SOFTMAX, SIGMOID, SQRT_SOFTPLUS };

// How good n experts with these logits are. `scores` may be `logits`.
void score(const float *logits, float *scores, int64_t n, int kind, int level);

// The chosen weights before they are scaled: the places' scores, or those of the places alone, not yet divided by their sum.
void raw_weights(const Choice &, const float *logits, const float *scores, const int64_t *experts, float *weights, int level);

// The scores of all experts, the chosen ones, best first, of equal ones the first, and their weights. `room` is for twice as
// many numbers as there are experts.
void choose(const Choice &, const float *logits, float *scores, int64_t *experts, float *weights, float *room, int level);

// What a sum of weights is divided by.
inline float divisor(const Choice &choice, const float *weights) {
    float sum = 0;
    for (int64_t k = 0; k < choice.top_k; k++) sum += weights[k];
    sum += float(choice.epsilon);
    return sum == 0 ? 1 : sum;
}

// The slopes of n tokens' chosen experts' logits, [n, top_k].
struct Slopes {
    const int64_t *experts;
    const float *slopes;
    int64_t n, top_k, n_experts;
};

// of_x[t] = sum over t's experts of a slope times the expert's centroid; of_centroids[e] = sum over e's tokens of a slope
// times the token, from the first token to the last. For AVX512; the width is whole vectors.
void router_gradients(const Slopes &, const void *x, const void *centroids, int64_t width, int bits, void *of_x, void *of_centroids, int threads);

}  // namespace choice
