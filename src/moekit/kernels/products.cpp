// Several products with the same rows in one call, rows and results in float32 or bfloat16, with biases.

#include "loops.h"
#include "rows.h"

extern "C" {

// y = matrix x + bias for each row of x. `bias` (or null) is bfloat16 if `narrow_bias`, else float32.
struct moekit_product {
    moekit_matrix matrix;
    const void *bias;
    void *y;
    int64_t narrow_bias;
};

void moekit_linear(const moekit_matrix *, const float *, int64_t, float *, int, int);
}

namespace {

template <typename Number> void add_bias(const Number *bias, float *y, int64_t n, int64_t out) {
    for (int64_t r = 0; r < n; r++)
        for (int64_t o = 0; o < out; o++) y[r * out + o] += widened(bias[o]);
}

}  // namespace

extern "C" {

// For n rows; x and y are bfloat16 if narrow, else float32. All matrices take rows of one length.
void moekit_products(const moekit_product *products, int64_t count, const void *x, int64_t n, int narrow_x, int narrow_y,
                     int threads, int level) {
    const int64_t in = products->matrix.in;
    rows::Buffer<float> wide(narrow_x ? n * in : 0), found;
    for (size_t i = 0; i < wide.size(); i++) wide[i] = widened(static_cast<const uint16_t *>(x)[i]);
    for (const moekit_product *job = products; job < products + count; job++) {
        const int64_t out = job->matrix.out;
        if (narrow_y) found.resize(n * out);
        float *y = narrow_y ? found.data() : static_cast<float *>(job->y);
        moekit_linear(&job->matrix, narrow_x ? wide.data() : static_cast<const float *>(x), n, y, threads, level);
        if (job->bias && job->narrow_bias) add_bias(static_cast<const uint16_t *>(job->bias), y, n, out);
        else if (job->bias) add_bias(static_cast<const float *>(job->bias), y, n, out);
        for (int64_t i = 0; narrow_y && i < n * out; i++) narrow_to(static_cast<uint16_t *>(job->y) + i, y[i]);
    }
}
}
