// A mixture for a few tokens in one call: logits, scores, choice and weights, then the chosen experts and the shared ones.

#include <algorithm>
#include <cmath>
#include <numeric>

#include "choice.h"
#include "loops.h"

extern "C" {
void moekit_swiglu_rows(const moekit_block *, int64_t, const void *, int, int64_t, int64_t, void *, int, int, int);
void moekit_linear_rows(const moekit_matrix *, const void *, int, int64_t, void *, int, int, int);
}

namespace {

// Rows of tokens and their weights.
struct Come {
    std::vector<int64_t> tokens;
    std::vector<float> weights;
};

// The chosen ones by expert, each expert's in the order of the tokens: row i is for experts[i].
struct Chosen {
    Come rows;
    std::vector<int64_t> experts;
};

// As moekit_by_expert, whose parallel region takes 1.5 us, a hundredth of a narrow layer's token, even with one thread.
Chosen by_expert(const int64_t *experts, const float *weights, int64_t n, int64_t top_k, int64_t n_experts) {
    const int64_t size = n * top_k;
    std::vector<int32_t> next(n_experts + 1);  // where an expert's next row comes
    for (int64_t i = 0; i < size; i++) next[experts[i] + 1]++;
    for (int64_t e = 1; e < n_experts; e++) next[e] += next[e - 1];
    Chosen found = {{std::vector<int64_t>(size), std::vector<float>(size)}, std::vector<int64_t>(size)};
    for (int64_t i = 0; i < size; i++) {
        const int64_t row = next[experts[i]]++;
        found.rows.tokens[row] = i / top_k, found.rows.weights[row] = weights[i], found.experts[row] = experts[i];
    }
    return found;
}

Chosen choose_for_all(const moekit_mixture &mixture, const moekit_call &call, int threads, int level) {
    const moekit_choice &choice = mixture.choice;
    if (!mixture.centroids.out) return {};
    rows::Buffer<float> room(2 * choice.n_experts);
    float *const logits = (float *)(call.numbers + choice.logits), *const scores = (float *)(call.numbers + choice.scores);
    float *const weights = (float *)(call.numbers + choice.weights);
    int64_t *const experts = (int64_t *)(call.places + choice.experts);
    moekit_linear_rows(&mixture.centroids, mixture.x, mixture.narrow, mixture.n, logits, 0, threads, level);
    for (int64_t t = 0; t < mixture.n; t++) {
        const int64_t at = t * choice.n_experts, chosen = t * choice.top_k;
        choice::choose(choice, logits + at, scores + at, experts + chosen, weights + chosen, room.data(), level);
    }
    return by_expert(experts, weights, mixture.n, choice.top_k, choice.n_experts);
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
    std::vector<moekit_block> blocks;
    blocks.reserve(chosen.experts.size() + 1);
    for (auto begin = chosen.experts.begin(), end = begin; begin < chosen.experts.end(); begin = end) {
        const int64_t expert = *begin, first = begin - chosen.experts.begin();
        end = std::upper_bound(begin, chosen.experts.end(), expert);
        if (m.table && !(m.table[2 * expert] && m.table[2 * expert + 1])) return false;
        blocks.push_back({matrix_of(m.gate_up, m.gate_up_step, m.table, expert),
                          matrix_of(m.down, m.down_step, m.table ? m.table + 1 : nullptr, expert),
                          &chosen.rows.tokens[first], &chosen.rows.weights[first], end - begin});
    }
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
