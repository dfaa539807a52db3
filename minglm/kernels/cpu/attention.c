/* Causal attention over whole rows, with its backward pass, in memory linear in their length.

   The twin of minglm/kernels/attention/chunked.py, where the equations are; minglm/kernels/cpu/attention.py calls it.
   POSITIONS of a row are computed together, with the G query heads that share a key head: their scores stay in a core's
   cache. The forward pass keeps a number for each query, the logarithm of the sum of its softmax, from which the backward
   pass computes the softmax again. All arrays are contiguous. */

#include "product.h"
#include <stdlib.h>

enum { POSITIONS = 16 };

typedef struct {
    long begin, n, first, keys; /* positions begin to begin + n see `keys` keys from `first` on, a whole vector */
} Stretch;

static Stretch stretch(const int64_t *starts, long begin, long S) {
    long n = S - begin < POSITIONS ? S - begin : POSITIONS, first = (starts ? starts[begin] : 0) / LANES * LANES;
    return (Stretch){begin, n, first, begin + n - first};
}

/* Copy the G heads of a stretch, x (S, heads, A) from the first of them on, times a factor, to rows of whole(A) floats */
static void gather(const float *x, Stretch s, long heads, long G, long A, float factor, float *to) {
    for (long i = 0; i < s.n * G; i++, to += whole(A))
        for (long a = 0; a < A; a++) to[a] = factor * x[((s.begin + i / G) * heads + i % G) * A + a];
}

static void scatter(const float *from, Stretch s, long heads, long G, long A, float factor, float *x) {
    for (long i = 0; i < s.n * G; i++, from += whole(A))
        for (long a = 0; a < A; a++) x[((s.begin + i / G) * heads + i % G) * A + a] = factor * from[a];
}

static Columns from_row(Columns b, long k) { return (Columns){b.at + k * b.next, b.next, b.apart}; }

static Columns from_column(Columns b, long c) { return (Columns){b.at + c / LANES * b.apart, b.next, b.apart}; }

/* Whether each of the keys from j on is seen by position p: -1 or 0 */
INLINE ints seen(const int64_t *starts, long p, Stretch s, long j) {
    int low = (starts ? starts[p] : 0) - s.first - j, high = p - s.first - j;
    return (lane() >= low) & (lane() <= high);
}

/* starts (B, S): the first key that each position sees, null: the first of the row. sums (B, M, S, G) are kept */
void attention_forward(const float *q, const float *k, const float *v, const int64_t *starts, float *out, float *sums, long B,
                       long S, long N, long M, long A) {
    long G = N / M, rows = POSITIONS * G, W = whole(A), C = whole(S) + LANES;
    float *queries = room(rows * (2 * W + C) + A * C + S * W), *mixed = queries + rows * W, *scores = mixed + rows * W;
    float *key_room = scores + rows * C, *value_room = key_room + A * C, root = 1 / sqrtf(A);
    for (long b = 0; b < B; b++, q += S * N * A, k += S * M * A, v += S * M * A, out += S * N * A, starts += starts ? S : 0)
        for (long m = 0; m < M; m++, sums += S * G) {
            Columns keys = columns_of(k + m * A, 1, M * A, A, S, key_room);
            Columns values = columns_of(v + m * A, M * A, 1, S, A, value_room);
            for (long p = 0; p < S; p += POSITIONS) {
                Stretch s = stretch(starts, p, S);
                long width = whole(s.keys);
                gather(q + m * G * A, s, N, G, A, root, queries);
                multiply(queries, W, 1, from_column(keys, s.first), scores, width, s.n * G, width, A, 0);
                for (long i = 0; i < s.n * G; i++) {
                    float *row = scores + i * width;
                    lanes most = all(-1e30f), total = {0};
                    ints wrong = {0};
                    for (long j = 0; j < width; j += LANES) {
                        lanes score = either(seen(starts, p + i / G, s, j), *(lanes *)(row + j), all(-1e30f));
                        *(lanes *)(row + j) = score;
                        most = larger(most, score);
                        wrong |= unsound(score);
                    }
                    float largest = largest_of(most);
                    for (long j = 0; j < width; j += LANES)
                        total += *(lanes *)(row + j) = exponential(*(lanes *)(row + j) - largest);
                    float sum = some_true(wrong) ? not_a_number() : sum_of(total);
                    for (long j = 0; j < width; j += LANES) *(lanes *)(row + j) *= 1 / sum;
                    sums[p * G + i] = largest + logf(sum);
                }
                multiply(scores, width, 1, from_row(values, s.first), mixed, W, s.n * G, W, s.keys, 0);
                scatter(mixed, s, N, G, A, 1, out + m * G * A);
            }
        }
    free(queries);
}

/* The gradients of q, k and v from dout (B, S, N, A) */
void attention_backward(const float *q, const float *k, const float *v, const int64_t *starts, const float *sums,
                        const float *dout, float *dq, float *dk, float *dv, long B, long S, long N, long M, long A) {
    long G = N / M, rows = POSITIONS * G, W = whole(A), C = whole(S) + LANES;
    float *queries = room(rows * (3 * W + 2 * C) + 2 * A * C + 3 * S * W), *grad = queries + rows * W, *mixed = grad + rows * W;
    float *scores = mixed + rows * W, *dscores = scores + rows * C, *key_room = dscores + rows * C;
    float *value_room = key_room + A * C, *row_room = value_room + A * C, *dkeys = row_room + S * W, *dvalues = dkeys + S * W;
    float root = 1 / sqrtf(A);
    memset(queries, 0, 2 * rows * W * sizeof *queries); /* what lies beyond A stays zero */
    for (long b = 0; b < B; b++, starts += starts ? S : 0) {
        long at = b * S * N * A, kv = b * S * M * A;
        for (long m = 0; m < M; m++, sums += S * G) {
            Columns keys = columns_of(k + kv + m * A, 1, M * A, A, S, key_room);
            Columns values = columns_of(v + kv + m * A, 1, M * A, A, S, value_room);
            Columns key_rows = columns_of(k + kv + m * A, M * A, 1, S, A, row_room);
            memset(dkeys, 0, 2 * S * W * sizeof *dkeys);
            for (long p = 0; p < S; p += POSITIONS) {
                Stretch s = stretch(starts, p, S);
                long width = whole(s.keys);
                gather(q + at + m * G * A, s, N, G, A, root, queries);
                gather(dout + at + m * G * A, s, N, G, A, 1, grad);
                multiply(queries, W, 1, from_column(keys, s.first), scores, width, s.n * G, width, A, 0);
                multiply(grad, W, 1, from_column(values, s.first), dscores, width, s.n * G, width, A, 0);
                for (long i = 0; i < s.n * G; i++) {
                    float *row = scores + i * width, *drow = dscores + i * width;
                    lanes dot = {0};
                    for (long j = 0; j < width; j += LANES) {
                        lanes score = *(lanes *)(row + j) - sums[p * G + i];
                        lanes weight = exponential(either(seen(starts, p + i / G, s, j), score, all(-1e30f)));
                        *(lanes *)(row + j) = weight;
                        dot += weight * *(lanes *)(drow + j);
                    }
                    float mean = sum_of(dot);
                    for (long j = 0; j < width; j += LANES)
                        *(lanes *)(drow + j) = *(lanes *)(row + j) * (*(lanes *)(drow + j) - mean);
                }
                multiply(scores, 1, width, (Columns){grad, W, LANES}, dvalues + s.first * W, W, s.keys, W, s.n * G, 1);
                multiply(dscores, 1, width, (Columns){queries, W, LANES}, dkeys + s.first * W, W, s.keys, W, s.n * G, 1);
                multiply(dscores, width, 1, from_row(key_rows, s.first), mixed, W, s.n * G, W, s.keys, 0);
                scatter(mixed, s, N, G, A, root, dq + at + m * G * A);
            }
            Stretch whole_row = {0, S, 0, S};
            scatter(dkeys, whole_row, M, 1, A, 1, dk + kv + m * A);
            scatter(dvalues, whole_row, M, 1, A, 1, dv + kv + m * A);
        }
    }
    free(queries);
}
