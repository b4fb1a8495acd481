// A mixture for a few tokens in one call: logits, scores, choice and weights (arXiv 2401.06066, eqs 9-11; 2405.04434, eqs
// 20-22; 2412.19437, eqs 12-16), then the chosen experts and the shared ones.

#include <cmath>
#include <limits>
#include <map>
#include <numeric>

#include "loops.h"
#include "rows.h"

extern "C" {

// Found, for each of n tokens: logits and scores of all experts, the chosen ones, best first, and their weights.
struct moekit_choice {
    float *logits, *scores, *weights;  // [n, n_experts], [n, n_experts], [n, top_k]
    int64_t *experts;                  // [n, top_k]
    const float *bias, *factor;        // [n_experts] or null: experts are ranked by score * factor + bias
    int64_t n_experts, top_k, n_groups, top_k_groups, summed;
    double epsilon, scale;
    int32_t score, late, renormalise;  // 0 softmax, 1 sigmoid, 2 root of softplus; `late`: score the chosen experts alone
};

// The experts of a layer lie `gate_up_step` and `down_step` bytes apart, or where `table` says: both addresses of each, 0
// where it is not in memory yet. Every token comes to the shared experts (none if `shared_down.out` is 0), by its weight.
struct moekit_mixture {
    moekit_matrix gate_up, down, shared_gate_up, shared_down;
    const int64_t *table;         // [n_experts, 2] or null
    const float *shared_weights;  // [n] or null: 1
    int64_t gate_up_step, down_step, few;  // rows for each expert up to which this is the way; 0: any number
};

void moekit_swiglu_rows(const moekit_block *, int64_t, const void *, int, int64_t, int64_t, void *, int, int, int);
void moekit_linear_rows(const moekit_matrix *, const void *, int, int64_t, void *, int, int, int);
}

namespace {

using Choice = moekit_choice;

void score(const float *logits, float *scores, int64_t n, int kind) {
    if (kind == 0) {
        const float most = *std::max_element(logits, logits + n);
        float total = 0;
        for (int64_t i = 0; i < n; i++) total += scores[i] = std::exp(logits[i] - most);
        for (int64_t i = 0; i < n; i++) scores[i] /= total;
        return;
    }
    for (int64_t i = 0; i < n; i++) {
        if (kind == 1) scores[i] = 1 / (1 + std::exp(-logits[i]));
        else scores[i] = std::sqrt(std::max(logits[i] > 20 ? logits[i] : std::log1p(std::exp(logits[i])), std::numeric_limits<float>::min()));
    }
}

// The places of the `count` greatest of n numbers, best first; of equal ones the first.
std::vector<int64_t> greatest(const float *numbers, int64_t n, int64_t count) {
    std::vector<int64_t> places(n);
    std::iota(places.begin(), places.end(), 0);
    const auto better = [=](int64_t a, int64_t b) { return numbers[a] > numbers[b] || (numbers[a] == numbers[b] && a < b); };
    std::partial_sort(places.begin(), places.begin() + count, places.end(), better);
    places.resize(count);
    return places;
}

// Experts outside the best groups fall to -infinity; a group is worth the sum of its best `summed`.
void close_groups(const Choice &choice, float *ranking) {
    const int64_t size = choice.n_experts / choice.n_groups;
    std::vector<float> worth(choice.n_groups, 0.0f);
    for (int64_t g = 0; g < choice.n_groups; g++)
        for (int64_t place : greatest(ranking + g * size, size, choice.summed)) worth[g] += ranking[g * size + place];
    std::vector<bool> open(choice.n_groups, false);
    for (int64_t g : greatest(worth.data(), choice.n_groups, choice.top_k_groups)) open[g] = true;
    for (int64_t i = 0; i < choice.n_experts; i++)
        if (!open[i / size]) ranking[i] = -INFINITY;
}

void choose(const Choice &choice, const float *logits, float *scores, int64_t *experts, float *weights) {
    score(logits, scores, choice.n_experts, choice.score);
    std::vector<float> ranking(scores, scores + choice.n_experts);
    for (int64_t i = 0; choice.factor && i < choice.n_experts; i++) ranking[i] *= choice.factor[i];
    for (int64_t i = 0; choice.bias && i < choice.n_experts; i++) ranking[i] += choice.bias[i];
    if (choice.top_k_groups < choice.n_groups) close_groups(choice, ranking.data());
    const std::vector<int64_t> best = greatest(ranking.data(), choice.n_experts, choice.top_k);
    std::copy(best.begin(), best.end(), experts);
    for (int64_t k = 0; k < choice.top_k; k++) weights[k] = (choice.late ? logits : scores)[experts[k]];
    if (choice.late) score(weights, weights, choice.top_k, choice.score);
    if (choice.renormalise) {
        const float sum = std::accumulate(weights, weights + choice.top_k, 0.0f) + float(choice.epsilon);
        for (int64_t k = 0; k < choice.top_k; k++) weights[k] /= sum == 0 ? 1 : sum;
    }
    for (int64_t k = 0; k < choice.top_k; k++) weights[k] *= float(choice.scale);
}

// The rows that come to an expert, and their weights.
struct Come {
    std::vector<int64_t> tokens;
    std::vector<float> weights;
};

moekit_matrix matrix_of(const moekit_matrix &first, int64_t step, const int64_t *table, int64_t expert) {
    moekit_matrix found = first;
    found.rows = table ? reinterpret_cast<const uint8_t *>(table[2 * expert]) : first.rows + expert * step;
    return found;
}

}  // namespace

extern "C" {

// For n rows of x and y, bfloat16 if `narrow`, else float32; `centroids` holds a row for each expert. Returns 0 if y is
// computed, else nothing is but the choice: 1 if a chosen expert is not in memory, 2 if there are too many rows.
int moekit_mixture_step(const moekit_choice *choice, const moekit_matrix *centroids, const moekit_mixture *mixture,
                        const void *x, void *y, int narrow, int64_t n, int threads, int level) {
    moekit_linear_rows(centroids, x, narrow, n, choice->logits, 0, threads, level);
    std::map<int64_t, Come> come;
    for (int64_t t = 0; t < n; t++) {
        const int64_t at = t * choice->n_experts, chosen = t * choice->top_k;
        choose(*choice, choice->logits + at, choice->scores + at, choice->experts + chosen, choice->weights + chosen);
        for (int64_t place = chosen; place < chosen + choice->top_k; place++) {
            Come &own = come[choice->experts[place]];
            own.tokens.push_back(t), own.weights.push_back(choice->weights[place]);
        }
    }
    const int64_t *table = mixture->table;
    for (const auto &[expert, own] : come)
        if (table && !(table[2 * expert] && table[2 * expert + 1])) return 1;
    if (mixture->few && n * choice->top_k > mixture->few * int64_t(come.size())) return 2;
    std::vector<moekit_block> blocks;
    for (const auto &[expert, own] : come)
        blocks.push_back({matrix_of(mixture->gate_up, mixture->gate_up_step, table, expert),
                          matrix_of(mixture->down, mixture->down_step, table ? table + 1 : nullptr, expert),
                          own.tokens.data(), own.weights.data(), int64_t(own.tokens.size())});
    std::vector<int64_t> everyone(n);
    std::iota(everyone.begin(), everyone.end(), 0);
    const std::vector<float> ones(n, 1.0f);
    const float *weights = mixture->shared_weights ? mixture->shared_weights : ones.data();
    if (mixture->shared_down.out) blocks.push_back({mixture->shared_gate_up, mixture->shared_down, everyone.data(), weights, n});
    moekit_swiglu_rows(blocks.data(), blocks.size(), x, narrow, n, centroids->in, y, narrow, threads, level);
    return 0;
}
}
