// What happens to one new token of each of a few sequences on its way through a model, as one compiled call takes it.
#pragma once

#include "one_query.h"
#include "products.h"

extern "C" {

// Rows are bfloat16 if `narrow`, else float32, and so are the weights of norms. With `query_norm` and `key_norm`, queries and
// keys are normed, all heads as one row if `whole`, else each. `clip` bounds queries, keys and values; infinite: not at all.
struct moekit_step {
    const void *x, *norm, *next_norm;  // [n, width], [width], [width]
    void *sum, *normed;                // x + attention(norm(x)), and the norm of that
    const void *query_norm, *key_norm;
    moekit_product query, key, value, output;  // `y` is not used
    moekit_query past;                     // `q`, `k`, `v` and `out` are not used
    int64_t width;
    float epsilon, clip;
    int32_t narrow, whole;
};

// As moekit_step for latent attention with absorbed projections: `kv_b` holds, for each head, `nope` rows that take a query to
// the latent and `value` rows that take a latent sum to a value. Without rows, `query_b` and its norm are not there.
struct moekit_latent_step {
    const void *x, *norm, *next_norm;
    void *sum, *normed;
    const void *query_norm, *latent_norm, *kv_b;
    moekit_product query, query_b, latent, output;  // `y` is not used
    moekit_query past;                              // of one key head; `q`, `k`, `v`, `out` and `past` are not used
    int64_t width, nope, value;
    float epsilon, latent_epsilon;
    int64_t narrow;
};

// Found, for each of n tokens: logits and scores of all experts, the chosen ones, best first, and their weights. Where these
// begin: so many bytes after the numbers and places of the call.
struct moekit_choice {
    int64_t logits, scores, weights;   // [n, n_experts], [n, n_experts], [n, top_k]
    int64_t experts;                   // [n, top_k]
    const float *bias, *factor;        // [n_experts] or null: experts are ranked by score * factor + bias
    int64_t n_experts, top_k, n_groups, top_k_groups, summed;
    double epsilon, scale;
    int32_t score, late, renormalise;  // 0 softmax, 1 sigmoid, 2 root of softplus; `late`: score the chosen experts alone
};

// y = added + the chosen experts + the shared ones. The experts lie `gate_up_step` and `down_step` bytes apart, or where
// `table` says: both addresses of each, 0 where it is not in memory yet. Every token comes to the shared experts, by the
// sigmoid of `shared_gate` where that has rows. Without rows, centroids and shared experts are not there.
struct moekit_mixture {
    moekit_choice choice;
    moekit_matrix centroids, gate_up, down, shared_gate_up, shared_down, shared_gate;
    const int64_t *table;  // [n_experts, 2] or null
    int64_t gate_up_step, down_step;
    const void *x, *added;  // [n, width]; `added` or null
    void *y;                // may be `added`
    int64_t n, width, narrow;
};

// norm(x) weight
struct moekit_last_norm {
    const void *x, *weight;
    int64_t n, width;
    float epsilon;
    int32_t narrow;
};

// What differs from token to token: how many are in the past, and where choices and the last norm go. Addresses may be 0, from
// which on choices then tell where they go.
struct moekit_call {
    int64_t past;
    uintptr_t numbers, places;
    void *y;
};

struct moekit_job {
    int64_t kind;  // 0 attention, 1 mixture, 2 norm, 3 latent attention
    union {
        moekit_step attention;
        moekit_latent_step latent;
        moekit_mixture mixture;
        moekit_last_norm norm;
    };
};

static_assert(sizeof(moekit_job) == 520, "token.py says how long a job is");

void moekit_norm_rows(const void *, const void *, const void *, void *, void *, int64_t, int64_t, float, int, int, int);
void moekit_attention_step(const moekit_step *, const moekit_call *, int, int);
void moekit_latent_attention_step(const moekit_latent_step *, const moekit_call *, int, int);
bool moekit_mixture_step(const moekit_mixture *, const moekit_call *, int, int);
}
