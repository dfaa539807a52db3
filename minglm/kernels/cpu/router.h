/* The choice of experts of one token, which generation and training share. */

#ifndef MINGLM_ROUTER
#define MINGLM_ROUTER

#include "lanes.h"

/* Select the K largest of scores + bias, ties to the lower index */
INLINE void select_experts(const float *scores, const float *bias, int64_t *experts, long E, long K) {
    float biased[E];
    for (long e = 0; e < E; e++) biased[e] = scores[e] + bias[e];
    for (long k = 0; k < K; k++) {
        long best = 0;
        for (long e = 1; e < E; e++) best = biased[e] > biased[best] ? e : best;
        experts[k] = best, biased[best] = -1e30f;
    }
}

#endif
