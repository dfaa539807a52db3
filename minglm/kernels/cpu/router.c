/* The router's choice for training. minglm/kernels/cpu/router.py calls it; the twin is `select_experts` of
   minglm/kernels/router/eager.py. All arrays are contiguous. */

#include "router.h"

/* From scores (T, E) and bias (E,) choose experts (T, K), best first */
void choose(const float *scores, const float *bias, int64_t *experts, long T, long E, long K) {
    for (long t = 0; t < T; t++) select_experts(scores + t * E, bias, experts + t * K, E, K);
}
