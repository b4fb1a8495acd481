// A mixture for a few tokens in one call: logits, scores, choice and weights (arXiv 2401.06066, eqs 9-11; 2405.04434, eqs
// 20-22; 2412.19437, eqs 12-16), then the chosen experts and the shared ones.

#include <cmath>
#include <limits>
#include <map>
#include <numeric>

#include "loops.h"
#include "token.h"

extern "C" {
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

using Chosen = std::map<int64_t, Come>;

Chosen choose_for_all(const moekit_mixture &mixture, const moekit_call &call, int threads, int level) {
    const Choice &choice = mixture.choice;
    Chosen found;
    if (!mixture.centroids.out) return found;
    float *logits = call.numbers + choice.logits, *scores = call.numbers + choice.scores, *weights = call.numbers + choice.weights;
    int64_t *experts = call.places + choice.experts;
    moekit_linear_rows(&mixture.centroids, mixture.x, mixture.narrow, mixture.n, logits, 0, threads, level);
    for (int64_t t = 0; t < mixture.n; t++) {
        const int64_t at = t * choice.n_experts, chosen = t * choice.top_k;
        choose(choice, logits + at, scores + at, experts + chosen, weights + chosen);
        for (int64_t place = chosen; place < chosen + choice.top_k; place++) {
            Come &own = found[experts[place]];
            own.tokens.push_back(t), own.weights.push_back(weights[place]);
        }
    }
    return found;
}

// All rows, by the weights of the shared experts.
Come everyone(const moekit_mixture &mixture, int threads, int level) {
    Come all = {std::vector<int64_t>(mixture.n), std::vector<float>(mixture.n, 1.0f)};
    std::iota(all.tokens.begin(), all.tokens.end(), 0);
    if (!mixture.shared_gate.out) return all;
    moekit_linear_rows(&mixture.shared_gate, mixture.x, mixture.narrow, mixture.n, all.weights.data(), 0, threads, level);
    for (float &weight : all.weights) weight = 1 / (1 + std::exp(-weight));
    return all;
}

moekit_matrix matrix_of(const moekit_matrix &first, int64_t step, const int64_t *table, int64_t expert) {
    moekit_matrix found = first;
    found.rows = table ? reinterpret_cast<const uint8_t *>(table[2 * expert]) : first.rows + expert * step;
    return found;
}

template <typename Number> void add(const Number *added, const Number *found, Number *y, int64_t n) {
    for (int64_t i = 0; i < n; i++) narrow_to(y + i, widened(added[i]) + widened(found[i]));
}

}  // namespace

extern "C" {

// Rows are bfloat16 if `narrow`, else float32. False where a chosen expert is not in memory: then nothing is but the choice.
bool moekit_mixture_step(const moekit_mixture *mixture, const moekit_call *call, int threads, int level) {
    const moekit_mixture &m = *mixture;
    const Chosen chosen = choose_for_all(m, *call, threads, level);
    for (const auto &[expert, own] : chosen)
        if (m.table && !(m.table[2 * expert] && m.table[2 * expert + 1])) return false;
    std::vector<moekit_block> blocks;
    for (const auto &[expert, own] : chosen)
        blocks.push_back({matrix_of(m.gate_up, m.gate_up_step, m.table, expert),
                          matrix_of(m.down, m.down_step, m.table ? m.table + 1 : nullptr, expert),
                          own.tokens.data(), own.weights.data(), int64_t(own.tokens.size())});
    const Come all = everyone(m, threads, level);
    if (m.shared_down.out) blocks.push_back({m.shared_gate_up, m.shared_down, all.tokens.data(), all.weights.data(), m.n});
    const int64_t size = m.n * m.width;
    rows::Buffer<float> found(m.added ? size : 0);
    void *y = m.added ? found.data() : m.y;
    moekit_swiglu_rows(blocks.data(), blocks.size(), m.x, m.narrow, m.n, m.width, y, m.narrow, threads, level);
    if (m.added && m.narrow) add((const uint16_t *)m.added, (const uint16_t *)y, (uint16_t *)m.y, size);
    else if (m.added) add((const float *)m.added, (const float *)y, (float *)m.y, size);
    return true;
}
}
