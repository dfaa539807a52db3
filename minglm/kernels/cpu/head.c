/* Output head with the log-probability of each target and the entropy of each distribution, and their backward pass.

   logp = l_target - log sum_v e^l_v,  l = cool * h W';   dl_v = dlogp ([v = target] - e^(l_v - log sum))

   The twin of minglm/kernels/cross_entropy/eager.py; minglm/kernels/cpu/head.py calls it. The vocabulary is walked in blocks of
   WORDS, and the tokens in blocks of TOKENS within each: a block of logits stays in a core's cache, no logits are kept, and
   the backward pass computes them again. `head_loss` need not: the weight of each token is known beforehand, so it computes
   the gradients in the same walk as the loss, as minglm/kernels/cross_entropy/chunked.py does. All arrays are contiguous. */

#include "product.h"
#include <stdlib.h>

enum { WORDS = 240, TOKENS = 64 };

/* Pack a block of the head's rows, times a factor, as the right factor of the logits */
static Columns cooled(const float *head, long words, long D, float cool, float *packed) {
    Columns block = columns_of(head, 1, D, D, words, packed);
    for (long i = 0; i < whole(words) * D; i++) packed[i] = block.at[i] * cool; /* of width one it is as it was */
    return (Columns){packed, LANES, D * LANES};
}

/* The logits of n tokens for `words` words, in rows of WORDS; beyond the last word -1e30 */
static void logits_of(const float *hidden, Columns head, float *logits, long n, long words, long D) {
    multiply(hidden, D, 1, head, logits, WORDS, n, words, D, 0);
    for (long t = 0; t < n && words < WORDS; t++)
        for (long v = words; v < WORDS; v++) logits[t * WORDS + v] = -1e30f;
}

/* sums (T,): the logarithm of the sum of each token's softmax, which is kept */
void head_forward(const float *hidden, const float *head, const int64_t *targets, float *logprobs, float *entropies, float *sums,
                  long T, long D, long V, float cool) {
    float *logits = room(TOKENS * WORDS + WORDS * D + 2 * T), *packed = logits + TOKENS * WORDS;
    float *largest = packed + WORDS * D, *moment = largest + T; /* of each token: sums, and moments, of e^(l - largest) */
    for (long t = 0; t < T; t++) largest[t] = -1e30f, sums[t] = moment[t] = 0;
    for (long first = 0; first < V; first += WORDS) {
        long words = V - first < WORDS ? V - first : WORDS;
        Columns block = cooled(head + first * D, words, D, cool, packed);
        for (long at = 0, n; at < T; at += n) {
            n = T - at < TOKENS ? T - at : TOKENS;
            logits_of(hidden + at * D, block, logits, n, words, D);
            for (long t = at; t < at + n; t++) {
                const float *l = logits + (t - at) * WORDS;
                lanes most = all(largest[t]), sum = {0}, weighted = {0};
                ints wrong = {0};
                for (long v = 0; v < WORDS; v += LANES) {
                    most = larger(most, *(const lanes *)(l + v));
                    wrong |= unsound(*(const lanes *)(l + v));
                }
                float now = largest_of(most), moved = largest[t] - now;
                for (long v = 0; v < words; v += LANES) {
                    lanes x = *(const lanes *)(l + v) - now, e = exponential(x);
                    sum += e;
                    weighted += e * x;
                }
                float kept = expf(moved);
                moment[t] = kept > 0 ? kept * (moment[t] + moved * sums[t]) : 0;
                moment[t] += sum_of(weighted);
                sums[t] = kept * sums[t] + sum_of(sum);
                if (some_true(wrong)) sums[t] = not_a_number();
                largest[t] = now;
                if (targets[t] >= first && targets[t] < first + words) logprobs[t] = l[targets[t] - first];
            }
        }
    }
    for (long t = 0; t < T; t++) {
        float log_sum = logf(sums[t]);
        logprobs[t] -= largest[t] + log_sum;
        entropies[t] = log_sum - moment[t] / sums[t];
        sums[t] = largest[t] + log_sum;
    }
    free(logits);
}

/* The gradients of hidden and head, which hold zeros, from dlogprobs (T,) */
void head_backward(const float *hidden, const float *head, const int64_t *targets, const float *sums, const float *dlogprobs,
                   float *dhidden, float *dhead, long T, long D, long V, float cool) {
    float *logits = room(TOKENS * WORDS + 2 * WORDS * whole(D) + TOKENS * whole(D)), *packed = logits + TOKENS * WORDS;
    float *rows = packed + WORDS * whole(D), *token_rows = rows + WORDS * whole(D);
    for (long first = 0; first < V; first += WORDS) {
        long words = V - first < WORDS ? V - first : WORDS;
        Columns block = cooled(head + first * D, words, D, cool, packed);
        Columns block_rows = columns_of(head + first * D, D, 1, words, D, rows);
        for (long at = 0, n; at < T; at += n) {
            n = T - at < TOKENS ? T - at : TOKENS;
            logits_of(hidden + at * D, block, logits, n, words, D);
            for (long t = at; t < at + n; t++) {
                float *l = logits + (t - at) * WORDS, grad = cool * dlogprobs[t];
                for (long v = 0; v < WORDS; v += LANES)
                    *(lanes *)(l + v) = -grad * exponential(*(lanes *)(l + v) - sums[t]);
                if (targets[t] >= first && targets[t] < first + words) l[targets[t] - first] += grad;
            }
            Columns tokens = columns_of(hidden + at * D, D, 1, n, D, token_rows);
            multiply(logits, WORDS, 1, block_rows, dhidden + at * D, D, n, D, words, 1);
            multiply(logits, 1, WORDS, tokens, dhead + first * D, D, words, D, n, 1);
        }
    }
    free(logits);
}

/* Write the sum of weight times cross-entropy over the tokens, and its gradients; dhead (V, D) holds zeros */
void head_loss(const float *hidden, const float *head, const int64_t *targets, const float *weights, float *loss,
               float *dhidden, float *dhead, long T, long D, long V) {
    long width = whole(V);
    float *logits = room(TOKENS * width + D * width + V * whole(D) + TOKENS * whole(D)), *packed = logits + TOKENS * width;
    float *rows = packed + D * width, *token_rows = rows + V * whole(D);
    Columns words = columns_of(head, 1, D, D, V, packed), word_rows = columns_of(head, D, 1, V, D, rows);
    double total = 0;
    for (long at = 0, n; at < T; at += n) {
        n = T - at < TOKENS ? T - at : TOKENS;
        multiply(hidden + at * D, D, 1, words, logits, width, n, V, D, 0);
        for (long t = at; t < at + n; t++) {
            float *l = logits + (t - at) * width, weight = weights[t];
            lanes most = all(-1e30f), sum = {0};
            ints wrong = {0};
            for (long v = V; v < width; v++) l[v] = -1e30f;
            for (long v = 0; v < width; v += LANES) {
                most = larger(most, *(lanes *)(l + v));
                wrong |= unsound(*(lanes *)(l + v));
            }
            float largest = largest_of(most), chosen = l[targets[t]];
            for (long v = 0; v < width; v += LANES) sum += *(lanes *)(l + v) = exponential(*(lanes *)(l + v) - largest);
            float share = some_true(wrong) ? not_a_number() : sum_of(sum);
            total += weight * (largest + logf(share) - chosen);
            for (long v = 0; v < width; v += LANES) *(lanes *)(l + v) *= weight / share;
            l[targets[t]] -= weight;
        }
        Columns tokens = columns_of(hidden + at * D, D, 1, n, D, token_rows);
        for (long first = 0; first < V; first += WORDS) {
            long count = V - first < WORDS ? V - first : WORDS;
            Columns here = {word_rows.at + first * word_rows.next, word_rows.next, word_rows.apart};
            multiply(logits + first, width, 1, here, dhidden + at * D, D, n, D, count, first > 0);
            multiply(logits + first, 1, width, tokens, dhead + first * D, D, count, D, n, 1);
        }
    }
    *loss = total;
    free(logits);
}
