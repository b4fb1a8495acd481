// The attention half of a block for one new token of each of a few sequences: the norm before it, three products, the past,
// the fourth product, the sum with the residual stream, and the norm of that. One call: between seven of them, memory rests.

#include "loops.h"
#include "token.h"

namespace {

// Numbers in bfloat16 or float32.
struct Scratch {
    int64_t size;
    bool narrow;
    rows::Buffer<float> memory;

    Scratch(int64_t size, bool narrow) : size(size), narrow(narrow), memory(narrow ? (size + 1) / 2 : size) {}
    void *data() { return memory.data(); }
    void clip(float most) {
        for (int64_t i = 0; i < size; i++) {
            if (narrow) {
                uint16_t *at = reinterpret_cast<uint16_t *>(memory.data()) + i;
                narrow_to(at, std::min(std::max(widened(*at), -most), most));
            } else memory[i] = std::min(std::max(memory[i], -most), most);
        }
    }
};

}  // namespace

extern "C" {

void moekit_attention_step(const moekit_step *step, const moekit_call *call, int threads, int level) {
    const moekit_step &s = *step;
    moekit_query past = s.past;
    past.past = call->past;
    const int64_t n = past.batch;
    const bool narrow = s.narrow && s.query_norm;  // norms round to the type of the rows, so what they get is rounded too
    Scratch normed(n * s.width, s.narrow), added(n * s.width, s.narrow), heads(n * past.heads * past.v_width, narrow);
    Scratch q(n * s.query.matrix.out, narrow), k(n * s.key.matrix.out, narrow), v(n * s.value.matrix.out, narrow);
    moekit_norm_rows(s.x, nullptr, s.norm, nullptr, normed.data(), n, s.width, s.epsilon, s.narrow, threads, level);
    moekit_product three[] = {s.query, s.key, s.value}, output = s.output;
    three[0].y = q.data(), three[1].y = k.data(), three[2].y = v.data(), output.y = added.data();
    moekit_products(three, 3, normed.data(), n, s.narrow, narrow, threads, level);
    const auto norm = [&](Scratch &rows, const void *weight) {
        const int64_t width = s.whole ? rows.size / n : past.width;
        if (weight) moekit_norm_rows(rows.data(), nullptr, weight, nullptr, rows.data(), rows.size / width, width, s.epsilon, narrow, threads, level);
    };
    norm(q, s.query_norm), norm(k, s.key_norm);
    if (s.clip < INFINITY) q.clip(s.clip), k.clip(s.clip), v.clip(s.clip);
    past.q = q.data(), past.k = k.data(), past.v = v.data(), past.out = heads.data(), past.narrow_new = narrow;
    moekit_one_query(&past, threads, level);
    moekit_products(&output, 1, heads.data(), n, narrow, s.narrow, threads, level);
    moekit_norm_rows(s.x, added.data(), s.next_norm, s.sum, s.normed, n, s.width, s.epsilon, s.narrow, threads, level);
}
}
