/* The router's choice for training, from its logits, with its backward pass.

   The twin of minglm/kernels/router/eager.py; minglm/kernels/router/__init__.py has the gradient, and
   minglm/kernels/cpu/router.py calls it. All arrays are contiguous. */

#include "router.h"

/* From logits (T, E) compute experts and weights (T, K), and scores (T, E) */
void route_forward(const float *logits, const float *bias, int64_t *experts, float *weights, float *scores, long T, long E,
                   long K, long normalize, float scale) {
    float row[whole(E)];
    memset(row, 0, sizeof row);
    for (long t = 0; t < T; t++) {
        memcpy(row, logits + t * E, E * sizeof *row);
        select_experts(bias, row, experts + t * K, weights + t * K, E, K, normalize, scale);
        memcpy(scores + t * E, row, E * sizeof *row);
    }
}

/* dlogits (T, E) from the gradients of the weights and, where dscores is not null, of the scores */
void route_backward(const int64_t *experts, const float *scores, const float *dweights, const float *dscores, float *dlogits,
                    long T, long E, long K, long normalize, float scale) {
    for (long t = 0; t < T; t++, experts += K, dweights += K, scores += E, dlogits += E) {
        float total = 1e-20f, mean = 0;
        for (long k = 0; k < K; k++) total += scores[experts[k]], mean += dweights[k] * scores[experts[k]];
        for (long e = 0; e < E; e++) dlogits[e] = dscores ? dscores[t * E + e] : 0;
        for (long k = 0; k < K; k++)
            dlogits[experts[k]] += normalize ? scale / total * (dweights[k] - mean / total) : scale * dweights[k];
        for (long e = 0; e < E; e++) dlogits[e] *= scores[e] * (1 - scores[e]);
    }
}
