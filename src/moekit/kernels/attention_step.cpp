// The attention half of a block for one new token of each of a few sequences: the norm before it, three products, the past,
// the fourth product, the sum with the residual stream, and the norm of that. And the same of latent attention, whose second
// projections are absorbed (arXiv 2405.04434, section 2.1).

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

// y[h] = x[h] W_h for the rows of W_h that a query has, and y[h] = W_h x[h]: once for each instruction set.
template <typename Number> INLINE void absorb(const Number *x, const Number *w, Number *y, int64_t in, int64_t out) {
    std::vector<float> sum(out, 0.0f);
    float *__restrict sums = sum.data();
    for (int64_t i = 0; i < in; i++) {
        const float factor = widened(x[i]);
        const Number *__restrict row = w + i * out;
        for (int64_t o = 0; o < out; o++) sums[o] += factor * widened(row[o]);
    }
    for (int64_t o = 0; o < out; o++) narrow_to(y + o, sums[o]);
}

template <typename Number> INLINE void expand(const Number *x, const Number *w, Number *y, int64_t in, int64_t out) {
    for (int64_t o = 0; o < out; o++) {
        const Number *row = w + o * in;
        narrow_to(y + o, sum_of(in, [&](int64_t i) { return widened(x[i]) * widened(row[i]); }));
    }
}

#define FOR_LEVEL(level, target) \
    template <typename Number> target void absorb##level(const Number *x, const Number *w, Number *y, int64_t in, int64_t out) { \
        absorb(x, w, y, in, out); \
    } \
    template <typename Number> target void expand##level(const Number *x, const Number *w, Number *y, int64_t in, int64_t out) { \
        expand(x, w, y, in, out); \
    }
FOR_LEVEL(0, )
FOR_LEVEL(1, AT_LEVEL_1)
FOR_LEVEL(2, AT_LEVEL_2)

template <typename Number> using Head = void (*)(const Number *, const Number *, Number *, int64_t, int64_t);
template <typename Number> Head<Number> absorb_at(int level) {
    return level >= 2 ? absorb2<Number> : level == 1 ? absorb1<Number> : absorb0<Number>;
}
template <typename Number> Head<Number> expand_at(int level) {
    return level >= 2 ? expand2<Number> : level == 1 ? expand1<Number> : expand0<Number>;
}

// Queries in the latent's room, from `q` of [n, heads, nope + rope] to `to` of [n, heads, latent + rope].
template <typename Number>
void to_latent(const moekit_latent_step &s, const Number *q, Number *to, int64_t latent, int threads, int level) {
    const int64_t heads = s.past.heads, rope = s.past.width - latent, own = s.nope + rope;
    const Head<Number> head = absorb_at<Number>(level);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < s.past.batch * heads; i++) {
        const Number *w = (const Number *)s.kv_b + i % heads * (s.nope + s.value) * latent;
        head(q + i * own, w, to + i * s.past.width, s.nope, latent);
        std::copy_n(q + i * own + s.nope, rope, to + i * s.past.width + latent);
    }
}

// Values of heads from sums of latents.
template <typename Number>
void from_latent(const moekit_latent_step &s, const Number *sums, Number *to, int64_t latent, int threads, int level) {
    const int64_t heads = s.past.heads;
    const Head<Number> head = expand_at<Number>(level);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < s.past.batch * heads; i++) {
        const Number *w = (const Number *)s.kv_b + (i % heads * (s.nope + s.value) + s.nope) * latent;
        head(sums + i * latent, w, to + i * s.value, latent, s.value);
    }
}

}  // namespace

extern "C" {

void moekit_latent_attention_step(const moekit_latent_step *step, const moekit_call *call, int threads, int level) {
    const moekit_latent_step &s = *step;
    moekit_query past = s.past;
    const int64_t n = past.batch, latent = past.v_width, size = s.narrow ? 2 : 4;
    const moekit_matrix &last = s.query_b.matrix.out ? s.query_b.matrix : s.query.matrix;
    Scratch normed(n * s.width, s.narrow), added(n * s.width, s.narrow), key(n * past.width, s.narrow);
    Scratch first(n * s.query.matrix.out, s.narrow), q(n * last.out, s.narrow), query(n * past.heads * past.width, s.narrow);
    Scratch sums(n * past.heads * latent, s.narrow), heads(n * past.heads * s.value, s.narrow);
    const auto norm = [&](const void *x, const void *weight, void *y, int64_t width, float epsilon) {
        moekit_norm_rows(x, nullptr, weight, nullptr, y, n, width, epsilon, s.narrow, threads, level);
    };
    norm(s.x, s.norm, normed.data(), s.width, s.epsilon);
    moekit_product two[] = {s.query, s.latent}, second = s.query_b, output = s.output;
    two[0].y = s.query_b.matrix.out ? first.data() : q.data(), two[1].y = key.data(), second.y = q.data(), output.y = added.data();
    moekit_products(two, 2, normed.data(), n, s.narrow, s.narrow, threads, level);
    if (s.query_b.matrix.out) {
        norm(first.data(), s.query_norm, first.data(), s.query.matrix.out, s.latent_epsilon);
        moekit_products(&second, 1, first.data(), n, s.narrow, s.narrow, threads, level);
    }
    for (int64_t t = 0; t < n; t++) {
        void *own = static_cast<char *>(key.data()) + t * past.width * size;
        moekit_norm_rows(own, nullptr, s.latent_norm, nullptr, own, 1, latent, s.latent_epsilon, s.narrow, threads, level);
    }
    if (s.narrow) to_latent(s, (const uint16_t *)q.data(), (uint16_t *)query.data(), latent, threads, level);
    else to_latent(s, (const float *)q.data(), (float *)query.data(), latent, threads, level);
    past.past = call->past, past.q = query.data(), past.k = key.data(), past.out = sums.data(), past.narrow_new = s.narrow;
    moekit_one_query(&past, threads, level);
    if (s.narrow) from_latent(s, (const uint16_t *)sums.data(), (uint16_t *)heads.data(), latent, threads, level);
    else from_latent(s, (const float *)sums.data(), (float *)heads.data(), latent, threads, level);
    moekit_products(&output, 1, heads.data(), n, s.narrow, s.narrow, threads, level);
    moekit_norm_rows(s.x, added.data(), s.next_norm, s.sum, s.normed, n, s.width, s.epsilon, s.narrow, threads, level);
}

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
