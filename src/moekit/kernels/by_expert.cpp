// The places of a routing in the order of their experts.

#include <algorithm>
#include <cstdint>
#include <vector>

extern "C" {

// Of n places, in groups of `top_k` for one token: those with an expert (not -1), sorted by it, the first of equal ones first,
// are rows. `tokens` says whose each row is, `rows` the row of each place (none: the number of rows), `bounds` where the rows of
// each expert begin, and where the last's end. False where there is no such expert.
bool moekit_by_expert(const int64_t *experts, int64_t n, int64_t top_k, int64_t n_experts, int64_t *tokens, int64_t *rows, int64_t *bounds) {
    std::vector<int64_t> next(n_experts + 1, 0);
    for (int64_t i = 0; i < n; i++) {
        if (experts[i] < -1 || experts[i] >= n_experts) return false;
        next[experts[i] + 1]++;
    }
    bounds[0] = 0;
    for (int64_t e = 0; e < n_experts; e++) bounds[e + 1] = bounds[e] + next[e + 1];
    std::copy(bounds, bounds + n_experts, next.begin());
    for (int64_t i = 0; i < n; i++) {
        if (experts[i] < 0) { rows[i] = bounds[n_experts]; continue; }
        rows[i] = next[experts[i]]++;
        tokens[rows[i]] = i / top_k;
    }
    return true;
}
}
