// The gradients that come back through a router's choice for many tokens: only the chosen experts' logits have one
// unless something looks at the scores of all, so that most of the products with the centroids need not be done.

#include <cmath>
#include <memory>

#include "choice.h"
#include "loops.h"

extern "C" {

// What `moekit_choose` found for n tokens of a type of `bits` bits, and the gradients that come back, each of which may be null.
struct moekit_chosen {
    moekit_choice choice;
    const float *logits, *scores;                       // [n, n_experts]
    const int64_t *experts;                             // [n, top_k]
    const float *of_weights, *of_scores, *of_logits;    // [n, top_k], [n, n_experts], [n, n_experts]
    int64_t n, bits;
};
}

namespace {

using namespace choice;

constexpr int64_t AHEAD = 4;  // tokens

// The slopes of n scores from those that come back to them, in their place.
INLINE void through_scores(const float *scores, int64_t n, int kind, float *slopes) {
    if (kind == SOFTMAX) {
        const float mean = sum_of(n, [=](int64_t i) { return scores[i] * slopes[i]; });
        for (int64_t i = 0; i < n; i++) slopes[i] = scores[i] * (slopes[i] - mean);
    } else if (kind == SIGMOID) {
        for (int64_t i = 0; i < n; i++) slopes[i] *= scores[i] * (1 - scores[i]);
    } else {
        // s = sqrt(log(1 + e^x)), and so d s / d x = (1 - e^(-s s)) / (2 s)
        for (int64_t i = 0; i < n; i++) slopes[i] *= -std::expm1(-scores[i] * scores[i]) / (2 * scores[i]);
    }
}

// The gradients of one token's raw weights, which `raw` holds.
INLINE void of_raw(const Choice &choice, const float *raw, const float *of_weights, float *found) {
    const float scale = float(choice.scale), sum = choice.renormalise ? divisor(choice, raw) : 1;
    float mean = 0;
    for (int64_t k = 0; choice.renormalise && k < choice.top_k; k++) mean += of_weights[k] * raw[k] / sum;
    for (int64_t k = 0; k < choice.top_k; k++) found[k] = scale / sum * (of_weights[k] - mean);
}

// One token's gradients of the chosen experts' logits, where nothing else has any.
INLINE void of_chosen(const moekit_chosen &c, int64_t t, float *raw, float *found, int level) {
    const Choice &choice = c.choice;
    const int64_t all = t * choice.n_experts, own = t * choice.top_k;
    raw_weights(choice, c.logits + all, c.scores + all, c.experts + own, raw, level);
    of_raw(choice, raw, c.of_weights + own, found);
    through_scores(raw, choice.top_k, choice.score, found);
}

// What `of_chosen` reads of a token that comes later, here and there in memory.
void ask_for_chosen(const moekit_chosen &c, int64_t t) {
    const float *numbers = (c.choice.late ? c.logits : c.scores) + t * c.choice.n_experts;
    for (int64_t k = 0; k < c.choice.top_k; k++) __builtin_prefetch(numbers + c.experts[t * c.choice.top_k + k]);
}

// One token's gradients of all logits.
INLINE void of_all(const moekit_chosen &c, int64_t t, float *raw, float *own_slopes, float *found, int level) {
    const Choice &choice = c.choice;
    const int64_t n = choice.n_experts, all = t * n, *experts = c.experts + t * choice.top_k;
    if (c.of_scores) std::copy_n(c.of_scores + all, n, found);
    else std::fill_n(found, n, 0.0f);
    if (c.of_weights && !choice.late) {
        raw_weights(choice, c.logits + all, c.scores + all, experts, raw, level);
        of_raw(choice, raw, c.of_weights + t * choice.top_k, own_slopes);
        for (int64_t k = 0; k < choice.top_k; k++) found[experts[k]] += own_slopes[k];
    }
    through_scores(c.scores + all, n, choice.score, found);
    if (c.of_weights && choice.late) {
        of_chosen(c, t, raw, own_slopes, level);
        for (int64_t k = 0; k < choice.top_k; k++) found[experts[k]] += own_slopes[k];
    }
    for (int64_t i = 0; c.of_logits && i < n; i++) found[i] += c.of_logits[all + i];
}

// These, rounded. `room` is for top_k numbers twice, and for as many as there are experts.
template <class Number> INLINE void slopes_of(const moekit_chosen &c, int64_t t, float *room, Number *to, int level) {
    const int64_t n = c.choice.n_experts, top_k = c.choice.top_k;
    float *__restrict found = room + 2 * top_k;
    of_all(c, t, room, room + top_k, found, level);
    for (int64_t i = 0; i < n; i++) narrow_to(to + t * n + i, found[i]);
}

template <class Number> using SlopesOf = void (*)(const moekit_chosen &, int64_t, float *, Number *);
template <class Number> void slopes0(const moekit_chosen &c, int64_t t, float *room, Number *to) { slopes_of(c, t, room, to, 0); }
template <class Number> AT_LEVEL_1 void slopes1(const moekit_chosen &c, int64_t t, float *room, Number *to) { slopes_of(c, t, room, to, 1); }
template <class Number> AT_LEVEL_2 void slopes2(const moekit_chosen &c, int64_t t, float *room, Number *to) { slopes_of(c, t, room, to, 2); }

template <class Number> void slopes_of_all(const moekit_chosen &c, Number *to, int threads, int level) {
    const SlopesOf<Number> of_token = level >= 2 ? slopes2<Number> : level == 1 ? slopes1<Number> : slopes0<Number>;
#pragma omp parallel num_threads(threads)
    {
        rows::Buffer<float> room(2 * c.choice.top_k + c.choice.n_experts);
#pragma omp for schedule(static)
        for (int64_t t = 0; t < c.n; t++) of_token(c, t, room.data(), to);
    }
}

}  // namespace

extern "C" {

// The gradients of all logits, [n, n_experts], rounded to the type of the tokens.
void moekit_slopes(const moekit_chosen *c, void *to, int threads, int level) {
    if (c->bits == 16) slopes_of_all(*c, (uint16_t *)to, threads, level);
    else slopes_of_all(*c, (float *)to, threads, level);
}

// The gradients of the tokens [n, width] and of the centroids [n_experts, width] where weights alone have one, and chosen
// logits alone get one.
void moekit_chosen_backward(const moekit_chosen *c, const void *x, const void *centroids, int64_t width, void *of_x, void *of_centroids, int threads, int level) {
    const int64_t top_k = c->choice.top_k;
    rows::Buffer<float> slopes(c->n * top_k);
#pragma omp parallel num_threads(threads)
    {
        rows::Buffer<float> raw(top_k);
#pragma omp for schedule(static)
        for (int64_t t = 0; t < c->n; t++) {
            if (t + AHEAD < c->n) ask_for_chosen(*c, t + AHEAD);
            of_chosen(*c, t, raw.data(), &slopes[t * top_k], level);
        }
    }
    router_gradients({c->experts, slopes.data(), c->n, top_k, c->choice.n_experts}, x, centroids, width, int(c->bits), of_x, of_centroids, threads);
}
}
