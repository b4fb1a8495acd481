// The products of linear.cpp and swiglu.cpp for rows and results in float32 or bfloat16: around a product of one row, converting and
// clearing by an operation each would take a share of its time.

#include "loops.h"
#include "rows.h"

extern "C" {
void moekit_linear(const moekit_matrix *, const float *, int64_t, float *, int, int);
void moekit_swiglu(const moekit_block *, int64_t, const float *, int64_t, int64_t, float *, int, int);
}

namespace {

constexpr int64_t WORTH_THREADS = 1 << 16;  // numbers from which converting is shared

template <typename From, typename To> void convert(const From *from, To *to, int64_t n, int threads) {
    if (n < WORTH_THREADS) {
        for (int64_t i = 0; i < n; i++) narrow_to(to + i, widened(from[i]));
        return;
    }
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < n; i++) narrow_to(to + i, widened(from[i]));
}

// compute(x, y) in float32, whatever x and y are.
template <typename Compute>
void in_float32(const void *x, bool narrow_x, int64_t n_x, void *y, bool narrow_y, int64_t n_y, int threads, Compute compute) {
    rows::Buffer<float> wide_x(narrow_x ? n_x : 0), wide_y(narrow_y ? n_y : 0);
    if (narrow_x) convert(static_cast<const uint16_t *>(x), wide_x.data(), n_x, threads);
    compute(narrow_x ? wide_x.data() : static_cast<const float *>(x), narrow_y ? wide_y.data() : static_cast<float *>(y));
    if (narrow_y) convert(wide_y.data(), static_cast<uint16_t *>(y), n_y, threads);
}

}  // namespace

extern "C" {

// y[t] = matrix x[t] for n rows; `narrow_x` and `narrow_y`: in bfloat16.
void moekit_linear_rows(const moekit_matrix *matrix, const void *x, int narrow_x, int64_t n, void *y, int narrow_y,
                        int threads, int level) {
    const auto compute = [=](const float *from, float *to) { moekit_linear(matrix, from, n, to, threads, level); };
    in_float32(x, narrow_x, n * matrix->in, y, narrow_y, n * matrix->out, threads, compute);
}

// y[t] = the sum over the blocks that t comes to of weight * down (silu(gate x[t]) * up x[t]).
void moekit_swiglu_rows(const moekit_block *blocks, int64_t n_blocks, const void *x, int narrow_x, int64_t n,
                        int64_t width, void *y, int narrow_y, int threads, int level) {
    const auto compute = [=](const float *from, float *to) {
        std::fill_n(to, n * width, 0.0f);
        moekit_swiglu(blocks, n_blocks, from, n, width, to, threads, level);
    };
    in_float32(x, narrow_x, n * width, y, narrow_y, n * width, threads, compute);
}
}
