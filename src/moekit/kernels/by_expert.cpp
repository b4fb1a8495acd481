// The places of a routing in the order of their experts.

#include <cstdint>
#include <omp.h>
#include <utility>
#include <vector>

namespace {

constexpr int64_t MANY = 4096;  // places that are worth a second thread

struct Share { int64_t begin, end; };

// A thread's of n places; those of a token may be parted.
Share share_of(int64_t n) {
    const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
    return {n * thread / threads, n * (thread + 1) / threads};
}

}  // namespace

extern "C" {

// Of n places, in groups of `top_k` for one token: those with an expert (not -1), sorted by it, the first of equal ones first,
// are rows. `tokens` says whose each row is, `rows` the row of each place (none: the number of rows), `bounds` where the rows of
// each expert begin, and where the last's end. False where there is no such expert.
bool moekit_by_expert(const int64_t *experts, int64_t n, int64_t top_k, int64_t n_experts, int64_t *tokens, int64_t *rows, int64_t *bounds, int threads) {
    threads = n < MANY ? 1 : threads;
    // For each thread, the places of each expert, and of none before these; then where the next one's row is.
    std::vector<std::vector<int64_t>> next(threads, std::vector<int64_t>(n_experts + 1, 0));
    bool known = true;
#pragma omp parallel num_threads(threads)
    {
        const Share own = share_of(n);
        int64_t *counts = next[omp_get_thread_num()].data() + 1;
        bool all = true;
        for (int64_t i = own.begin; i < own.end; i++) {
            const bool there = experts[i] >= -1 && experts[i] < n_experts;
            if (there) counts[experts[i]]++;
            all = all && there;
        }
#pragma omp critical
        known = known && all;
#pragma omp barrier
#pragma omp single
        {
            int64_t row = 0;
            for (int64_t e = 0; e < n_experts; e++) {
                bounds[e] = row;
                for (std::vector<int64_t> &each : next) row += std::exchange(each[e + 1], row);
            }
            bounds[n_experts] = row;
        }
        int64_t token = own.begin / top_k, left = top_k - own.begin % top_k;
        for (int64_t i = own.begin; known && i < own.end; i++) {
            rows[i] = experts[i] < 0 ? bounds[n_experts] : counts[experts[i]]++;
            if (experts[i] >= 0) tokens[rows[i]] = token;
            if (--left == 0) token++, left = top_k;
        }
    }
    return known;
}
}
