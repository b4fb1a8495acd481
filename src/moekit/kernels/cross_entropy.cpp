// Cross entropy of rows of logits, and its gradient in their place: a row is read from memory once and written once.

#include <vector>

#include "loops.h"

namespace {

struct Job {
    void *logits;
    const int64_t *targets;
    float *losses;
    int64_t n_rows, n_classes;
    bool gradient;
};

template <typename Number> INLINE void row_of(const Job &job, int64_t row, float *powers) {
    Number *logits = (Number *)job.logits + row * job.n_classes;
    const int64_t n = job.n_classes;
    float lanes[LANES];
    for (float &lane : lanes) lane = -INFINITY;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int lane = 0; lane < LANES; lane++) lanes[lane] = std::max(lanes[lane], widened(logits[i + lane]));
    for (; i < n; i++) lanes[0] = std::max(lanes[0], widened(logits[i]));
    const float largest = *std::max_element(lanes, lanes + LANES);
    for (i = 0; i < n; i++) powers[i] = power_of_2((widened(logits[i]) - largest) * LOG2_E);
    const float sum = sum_of(n, [&](int64_t j) { return powers[j]; });
    const int64_t target = job.targets[row];
    job.losses[row] = std::log(sum) + largest - widened(logits[target]);
    if (!job.gradient) return;
    const float factor = 1 / sum;
    for (i = 0; i < n; i++) narrow_to(logits + i, powers[i] * factor);
    narrow_to(logits + target, powers[target] * factor - 1);
}

using Row = void (*)(const Job &, int64_t, float *);
template <typename Number> void row0(const Job &job, int64_t row, float *powers) { row_of<Number>(job, row, powers); }
template <typename Number> AT_LEVEL_1 void row1(const Job &job, int64_t row, float *powers) { row_of<Number>(job, row, powers); }
template <typename Number> AT_LEVEL_2 void row2(const Job &job, int64_t row, float *powers) { row_of<Number>(job, row, powers); }

const Row NARROW[] = {row0<uint16_t>, row1<uint16_t>, row2<uint16_t>}, WIDE[] = {row0<float>, row1<float>, row2<float>};

}  // namespace

extern "C" {

// losses[r] = -log softmax(row r)[target r]; with `gradient`, the row becomes softmax(row r) - [target r].
void moekit_cross_entropy(void *logits, int narrow, const int64_t *targets, int64_t n_rows, int64_t n_classes, int gradient,
                          float *losses, int threads, int level) {
    const Job job{logits, targets, losses, n_rows, n_classes, gradient != 0};
    const Row row = (narrow ? NARROW : WIDE)[level < 2 ? level : 2];
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> powers(n_classes);
#pragma omp for schedule(static)
        for (int64_t r = 0; r < n_rows; r++) row(job, r, powers.data());
    }
}
}
