/* The choice of experts of one token, which generation and training share. */

#ifndef MINGLM_ROUTER
#define MINGLM_ROUTER

#include "lanes.h"

/* Replace the logits of a token by their sigmoids and select the K largest of sigmoid + bias, ties to the lower index, with
   their weights; logits: E in whole vectors */
INLINE void select_experts(const float *bias, float *logits, int64_t *experts, float *weights, long E, long K, long normalize,
                           float scale) {
    float biased[E], total = 1e-20f;
    for (long e = 0; e < E; e += LANES) *(lanes *)(logits + e) = 1 / (1 + exponential(-*(lanes *)(logits + e)));
    for (long e = 0; e < E; e++) biased[e] = logits[e] + bias[e];
    for (long k = 0; k < K; k++) {
        long best = 0;
        for (long e = 1; e < E; e++) best = biased[e] > biased[best] ? e : best;
        experts[k] = best, weights[k] = logits[best], total += logits[best], biased[best] = -1e30f;
    }
    for (long k = 0; k < K; k++) weights[k] *= normalize ? scale / total : scale;
}

#endif
