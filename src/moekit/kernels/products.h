// A product as several kernels take it.
#pragma once

#include "rows.h"

extern "C" {

// y = matrix x + bias for each row of x. `bias` (or null) is bfloat16 if `narrow_bias`, else float32.
struct moekit_product {
    moekit_matrix matrix;
    const void *bias;
    void *y;
    int64_t narrow_bias;
};

void moekit_products(const moekit_product *, int64_t, const void *, int64_t, int, int, int, int);
}
