// Several products with the same rows in one call, rows and results in float32 or bfloat16, with biases.

#include "loops.h"
#include "products.h"

extern "C" void moekit_linears(const moekit_matrix *const *, float *const *, int64_t, const float *, int64_t, int, int);

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
    rows::Buffer<float> wide(narrow_x ? n * in : 0);
    for (size_t i = 0; i < wide.size(); i++) wide[i] = widened(static_cast<const uint16_t *>(x)[i]);
    std::vector<rows::Buffer<float>> found(count);
    std::vector<const moekit_matrix *> matrices(count);
    std::vector<float *> ys(count);
    for (int64_t i = 0; i < count; i++) {
        if (narrow_y) found[i].resize(n * products[i].matrix.out);
        matrices[i] = &products[i].matrix, ys[i] = narrow_y ? found[i].data() : static_cast<float *>(products[i].y);
    }
    moekit_linears(matrices.data(), ys.data(), count, narrow_x ? wide.data() : static_cast<const float *>(x), n, threads, level);
    for (int64_t i = 0; i < count; i++) {
        const moekit_product &job = products[i];
        const int64_t out = job.matrix.out;
        if (job.bias && job.narrow_bias) add_bias(static_cast<const uint16_t *>(job.bias), ys[i], n, out);
        else if (job.bias) add_bias(static_cast<const float *>(job.bias), ys[i], n, out);
        for (int64_t j = 0; narrow_y && j < n * out; j++) narrow_to(static_cast<uint16_t *>(job.y) + j, ys[i][j]);
    }
}
}
