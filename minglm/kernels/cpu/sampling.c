/* Drawing tokens on a CPU in float32.

   The twin of minglm/inference/sampling.py; minglm/kernels/cpu/sampling.py calls it. All arrays are contiguous; letters of
   axes are those of minglm/__init__.py. */

#include "lanes.h"

enum { STRETCH = 64 }; /* tokens whose probabilities are summed together before one of them is looked for */

static uint64_t mixed(uint64_t x) {
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

/* Return the smallest p that top-p keeps: the tokens above it have less than `goal` together, and with it at least `goal`.
   The bits of positive floats are in the order of the floats, so they are bisected. */
static float smallest_kept(const float *p, float largest, double goal, long V) {
    uint32_t low = 0, high;
    memcpy(&high, &largest, sizeof high);
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        float border, above = 0;
        memcpy(&border, &middle, sizeof border);
        for (long v = 0; v < V; v++) above += p[v] > border ? p[v] : 0;
        if (above < goal) high = middle;
        else low = middle + 1;
    }
    memcpy(&largest, &low, sizeof largest);
    return largest;
}

typedef struct {
    float largest, cool; /* the largest logit, and the reciprocal of the temperature; 1 at temperature 0 */
    double sum;          /* of e^((logit - largest) * cool) */
} Softmax;

/* Write e^((logit - largest) * cool) of each token to scratch. Never inlined, like the function after it: what a token is
   given when it is drawn and when it is looked up later has the same bits because it is the same code. */
static __attribute__((noinline)) Softmax softmax(const float *logits, float temperature, float *scratch, long V) {
    Softmax s = {-INFINITY, temperature > 0 ? 1 / temperature : 1, 0};
    for (long v = 0; v < V; v++) s.largest = logits[v] > s.largest ? logits[v] : s.largest;
    for (long v = 0; v < V; v++) scratch[v] = (logits[v] - s.largest) * s.cool;
    for (long v = 0; v < V; v += LANES) *(lanes *)(scratch + v) = exponential(*(lanes *)(scratch + v));
    for (long v = 0; v < V; v++) s.sum += scratch[v];
    return s;
}

static __attribute__((noinline)) float log_probability(const Softmax *s, float logit) {
    return (logit - s->largest) * s->cool - log(s->sum);
}

/* Compute the log-probability of a token of each row of logits (B, V) at the row's temperature, with the bits that `sample`
   gives it; scratch as there */
void log_probabilities(const float *logits, const float *temperature, const int64_t *tokens, float *logprobs, float *scratch,
                       long B, long V) {
    for (long b = 0; b < B; b++, logits += V) {
        Softmax s = softmax(logits, temperature[b], scratch, V);
        logprobs[b] = log_probability(&s, logits[tokens[b]]);
    }
}

/* Draw a token for each row of logits (B, V), and its log-probability: `uniforms` and `sample` of inference/sampling.py with
   top-p alone (null: no cut). At temperature 0 it is the first of the largest. scratch: V floats in whole vectors */
void sample(const float *logits, const float *temperature, const float *top_p, const int64_t *seed, const int64_t *index,
            int64_t purpose, int64_t *tokens, float *logprobs, float *scratch, long B, long V) {
    const uint64_t golden = 0x9e3779b97f4a7c15u;
    for (long b = 0; b < B; b++, logits += V) {
        uint64_t x = mixed(mixed(seed[b] + (index[b] + 1) * golden) + (purpose + 1) * golden);
        Softmax s = softmax(logits, temperature[b], scratch, V);
        double total = 0, before = 0;
        if (top_p && top_p[b] < 1) {
            double goal = top_p[b] * s.sum, above = 0;
            float border = smallest_kept(scratch, 1, goal, V);
            for (long v = 0; v < V; v++) above += scratch[v] > border ? scratch[v] : 0;
            for (long v = 0; v < V; v++) /* of equal ones the first, until the goal is reached; the likeliest in any case */
                if (scratch[v] == border && (above < goal || above == 0)) above += scratch[v];
                else if (scratch[v] <= border) scratch[v] = 0;
        }
        float stretches[V / STRETCH + 1];
        for (long v = 0; v < V; v += STRETCH) {
            float sum = 0;
            for (long i = v; i < (v + STRETCH < V ? v + STRETCH : V); i++) sum += scratch[i];
            stretches[v / STRETCH] = sum, total += sum;
        }
        double goal = (x >> 11) * 0x1p-53 * total;
        long v = 0, token = -1;
        if (temperature[b] > 0) {
            while (v + STRETCH < V && before + stretches[v / STRETCH] <= goal) before += stretches[v / STRETCH], v += STRETCH;
            for (; v < V && before <= goal; v++) /* rounding may move the goal past a stretch, but a token of probability 0 is never drawn */
                if (scratch[v] > 0) before += scratch[v], token = v;
        }
        if (token < 0) /* greedy; or the goal fell behind the last token with a probability */
            for (token = 0; logits[token] != s.largest;) token++;
        tokens[b] = token;
        logprobs[b] = log_probability(&s, logits[token]);
    }
}
