// RMSNorm (arXiv 1910.07467), forward and backward: a row is read from memory once and written once. The backward finds x / rms(x)
// in y, which is kept anyway for the product that reads it.

#include <vector>

#include "loops.h"

extern "C" {

// Rows of `width` numbers, bfloat16 if `narrow`, else float32; `scale` holds 1 / sqrt(mean(x^2) + epsilon) of each.
struct moekit_norm {
    const void *x, *weight;
    void *y;  // x scale weight
    const void *grad;
    void *grad_x;
    float *scale, *grad_weight;
    int64_t n_rows, width;
    float epsilon;
    int32_t narrow;
};
}

namespace {

template <typename Number> INLINE void forward(const moekit_norm &job, int64_t row) {
    const int64_t n = job.width;
    const Number *__restrict x = (const Number *)job.x + row * n, *__restrict weight = (const Number *)job.weight;
    Number *__restrict y = (Number *)job.y + row * n;
    const float squares = sum_of(n, [&](int64_t i) { return widened(x[i]) * widened(x[i]); });
    const float scale = 1 / std::sqrt(squares / float(n) + job.epsilon);
    for (int64_t i = 0; i < n; i++) {
        Number rounded;
        narrow_to(&rounded, widened(x[i]) * scale);
        narrow_to(y + i, widened(rounded) * widened(weight[i]));
    }
    job.scale[row] = scale;
}

// Without what a backward wants; `added`, if not null, is added to x first, and the sum is kept.
template <typename Number>
INLINE void only_forward(const Number *given, const Number *added, const Number *__restrict weight, Number *sum,
                         Number *y, int64_t n, float epsilon) {
    for (int64_t i = 0; added && i < n; i++) narrow_to(sum + i, widened(given[i]) + widened(added[i]));
    const Number *x = added ? sum : given;
    const float squares = sum_of(n, [&](int64_t i) { return widened(x[i]) * widened(x[i]); });
    const float scale = 1 / std::sqrt(squares / float(n) + epsilon);
    for (int64_t i = 0; i < n; i++) {
        Number rounded;
        narrow_to(&rounded, widened(x[i]) * scale);
        narrow_to(y + i, widened(rounded) * widened(weight[i]));
    }
}

// `sums` gathers grad y over the rows of a thread; `parts` holds 1 / weight.
template <typename Number> INLINE void backward(const moekit_norm &job, int64_t row, const float *__restrict parts, float *__restrict sums) {
    const int64_t n = job.width;
    const Number *__restrict y = (const Number *)job.y + row * n, *__restrict weight = (const Number *)job.weight;
    const Number *__restrict grad = (const Number *)job.grad + row * n;
    Number *__restrict grad_x = (Number *)job.grad_x + row * n;
    const float product = sum_of(n, [&](int64_t i) { return widened(grad[i]) * widened(y[i]); });
    const float projection = product / float(n), scale = job.scale[row];
    for (int64_t i = 0; i < n; i++) {
        const float g = widened(grad[i]), of_y = widened(y[i]);
        sums[i] += g * of_y;
        narrow_to(grad_x + i, (g * widened(weight[i]) - of_y * parts[i] * projection) * scale);
    }
}

// The same loops, once for each instruction set.
using Forward = void (*)(const moekit_norm &, int64_t);
template <typename Number> using Only = void (*)(const Number *, const Number *, const Number *, Number *, Number *, int64_t, float);
using Backward = void (*)(const moekit_norm &, int64_t, const float *, float *);
template <typename Number> void forward0(const moekit_norm &job, int64_t row) { forward<Number>(job, row); }
template <typename Number> AT_LEVEL_1 void forward1(const moekit_norm &job, int64_t row) { forward<Number>(job, row); }
template <typename Number> AT_LEVEL_2 void forward2(const moekit_norm &job, int64_t row) { forward<Number>(job, row); }
template <typename Number>
void only0(const Number *x, const Number *added, const Number *weight, Number *sum, Number *y, int64_t n, float epsilon) {
    only_forward(x, added, weight, sum, y, n, epsilon);
}
template <typename Number>
AT_LEVEL_1 void only1(const Number *x, const Number *added, const Number *weight, Number *sum, Number *y, int64_t n, float epsilon) {
    only_forward(x, added, weight, sum, y, n, epsilon);
}
template <typename Number>
AT_LEVEL_2 void only2(const Number *x, const Number *added, const Number *weight, Number *sum, Number *y, int64_t n, float epsilon) {
    only_forward(x, added, weight, sum, y, n, epsilon);
}
template <typename Number> void backward0(const moekit_norm &job, int64_t row, const float *parts, float *sums) { backward<Number>(job, row, parts, sums); }
template <typename Number> AT_LEVEL_1 void backward1(const moekit_norm &job, int64_t row, const float *parts, float *sums) { backward<Number>(job, row, parts, sums); }
template <typename Number> AT_LEVEL_2 void backward2(const moekit_norm &job, int64_t row, const float *parts, float *sums) { backward<Number>(job, row, parts, sums); }

const Forward NARROW[] = {forward0<uint16_t>, forward1<uint16_t>, forward2<uint16_t>};
const Forward WIDE[] = {forward0<float>, forward1<float>, forward2<float>};
const Backward NARROW_BACK[] = {backward0<uint16_t>, backward1<uint16_t>, backward2<uint16_t>};
const Backward WIDE_BACK[] = {backward0<float>, backward1<float>, backward2<float>};

// One row is done before a second thread would have begun.
template <typename Number>
void norm_rows(const Number *x, const Number *added, const Number *weight, Number *sum, Number *y, int64_t n, int64_t width,
               float epsilon, int threads, int level) {
    const Only<Number> row = level >= 2 ? only2<Number> : level == 1 ? only1<Number> : only0<Number>;
#pragma omp parallel for num_threads(threads) schedule(static) if (n * width >= 1 << 15)
    for (int64_t i = 0; i < n * width; i += width) row(x + i, added ? added + i : nullptr, weight, added ? sum + i : nullptr, y + i, width, epsilon);
}

}  // namespace

extern "C" {

// y = norm(x) weight; with `added`, sum = x + added and y = norm(sum) weight.
void moekit_norm_rows(const void *x, const void *added, const void *weight, void *sum, void *y, int64_t n, int64_t width,
                      float epsilon, int narrow, int threads, int level) {
    using Narrow = uint16_t;
    if (narrow)
        return norm_rows((const Narrow *)x, (const Narrow *)added, (const Narrow *)weight, (Narrow *)sum, (Narrow *)y, n, width, epsilon, threads, level);
    norm_rows((const float *)x, (const float *)added, (const float *)weight, (float *)sum, (float *)y, n, width, epsilon, threads, level);
}

// y and scale of x and weight.
void moekit_norm_forward(const moekit_norm *job, int threads, int level) {
    const Forward row = (job->narrow ? NARROW : WIDE)[level < 2 ? level : 2];
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < job->n_rows; r++) row(*job, r);
}

// grad_x and grad_weight of weight, y, scale and grad. No weight is zero, or so small that it made a y zero.
void moekit_norm_backward(const moekit_norm *job, int threads, int level) {
    const Backward row = (job->narrow ? NARROW_BACK : WIDE_BACK)[level < 2 ? level : 2];
    std::vector<float> sums(threads * job->width), parts(job->width);
    for (int64_t i = 0; i < job->width; i++) parts[i] = 1 / (job->narrow ? widened(((const uint16_t *)job->weight)[i]) : ((const float *)job->weight)[i]);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int t = 0; t < threads; t++)
        for (int64_t r = job->n_rows * t / threads; r < job->n_rows * (t + 1) / threads; r++) row(*job, r, parts.data(), &sums[t * job->width]);
    for (int64_t i = 0; i < job->width; i++) {
        float total = 0;
        for (int t = 0; t < threads; t++) total += sums[t * job->width + i];
        job->grad_weight[i] = total * parts[i];
    }
}
}
