// Attention of one new token as several kernels take it.
#pragma once

#include <cstdint>

extern "C" {

// The past is bfloat16 if `narrow`, else float32; so are the new token and `out` by `narrow_new`. Without `v` and `values`,
// a value is the beginning of its key. The last 2 * half numbers of queries and keys are turned.
struct moekit_query {
    const void *q, *k, *v;   // [batch, heads, width], [batch, kv_heads, width], [batch, kv_heads, v_width]
    const float *cos, *sin;  // [batch or 1, half]
    void *keys, *values;     // [batch, kv_heads, capacity, width or v_width]; the new token's come to place `past`
    void *out;               // [batch, heads, v_width]
    int64_t batch, heads, kv_heads, width, v_width, half, capacity, past, turn_step;
    float scale;
    int32_t narrow, narrow_new, interleaved;
};

void moekit_one_query(const moekit_query *, int, int);
}
