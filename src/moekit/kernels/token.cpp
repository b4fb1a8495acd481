// One new token of each of a few sequences through all blocks: whatever comes between two of them pushes memory to rest.

#include "token.h"

extern "C" {

// Does the jobs from `first` on; returns how many of all are done: where not all, the next one's mixture has chosen an expert
// that is not in memory.
int64_t moekit_token(const moekit_job *jobs, int64_t count, int64_t first, const moekit_call *call, int threads, int level) {
    for (; first < count; first++) {
        const moekit_job &job = jobs[first];
        const moekit_last_norm &norm = job.norm;
        if (job.kind == 0) moekit_attention_step(&job.attention, call, threads, level);
        else if (job.kind == 3) moekit_latent_attention_step(&job.latent, call, threads, level);
        else if (job.kind == 2)
            moekit_norm_rows(norm.x, nullptr, norm.weight, nullptr, call->y, norm.n, norm.width, norm.epsilon, norm.narrow, threads, level);
        else if (!moekit_mixture_step(&job.mixture, call, threads, level)) break;
    }
    return first;
}
}
