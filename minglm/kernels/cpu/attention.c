/* Causal attention over whole rows, with its backward pass, in memory linear in their length.

   The twin of minglm/kernels/attention/chunked.py, where the equations are; minglm/kernels/cpu/attention.py calls it. Some
   positions of a row are computed together, with the G query heads that share a key head: these queries are the lanes of
   two vectors, and a key is a row of scores. So keys and values are read where they are, and maxima and sums over keys are
   those of vectors. With more queries together, more keys would be computed that only the last of them see. The forward
   pass keeps a number for each query, the logarithm of the sum of its softmax, from which the backward pass computes the
   softmax again. All arrays are contiguous.

   Where answers share a prompt (minglm/kernels/attention/shared.py), a position sees keys in two ranges: those of the prompt,
   and those from the start of its own answer on. Their scores lie one after the other. */

#include "product.h"
#include <stdlib.h>

/* Positions begin to begin + n see `shared` keys from `prompt` on, and then `keys` keys from `first` on */
typedef struct {
    long begin, n, prompt, shared, first, keys;
} Stretch;

static long positions_together(long G) { return 2 * LANES > G ? 2 * LANES / G : 1; }

static Stretch stretch(const int64_t *starts, const int64_t *prompts, long begin, long S, long positions) {
    long n = S - begin < positions ? S - begin : positions, first = starts ? starts[begin] : 0, prompt = 0, shared = 0;
    if (prompts) {
        const int64_t *own = prompts + 2 * begin;
        long same = 1;
        while (same < n && own[2 * same] == own[0] && own[2 * same + 1] == own[1]) same++;
        n = same, prompt = own[0], shared = own[1] - own[0];
    }
    return (Stretch){begin, n, prompt, shared, first, begin + n - first};
}

/* Copy the G heads of a stretch, x (S, heads, A) from the first of them on, times a factor, to rows of whole(A) floats, with
   zeros at the end of each */
static void gather(const float *x, Stretch s, long heads, long G, long A, float factor, float *to) {
    x += s.begin * heads * A;
    for (long i = 0; i < s.n; i++, x += heads * A)
        for (long g = 0; g < G; g++, to += whole(A))
            for (long a = 0; a < A; a += LANES) *(lanes *)(to + a) = factor * some(x + g * A + a, A - a);
}

static void scatter(const float *from, Stretch s, long heads, long G, long A, float factor, float *x) {
    x += s.begin * heads * A;
    for (long i = 0; i < s.n; i++, x += heads * A)
        for (long g = 0; g < G; g++, from += whole(A))
            for (long a = 0; a < A; a += LANES) put(factor * *(const lanes *)(from + a), x + g * A + a, A - a);
}

/* Transpose rows of queries (R, whole(A)) to (whole(A), R), or back */
static void to_lanes(const float *rows, long R, long A, float *columns) {
    for (long r = 0; r < R; r += LANES) transpose(rows + r * whole(A), whole(A), A, columns + r, R);
}

static void to_rows(const float *columns, long R, long A, float *rows) {
    for (long a = 0; a < A; a += LANES) transpose(columns + a * R, R, R, rows + a, whole(A));
}

/* scores (shared + keys, R): the dot products of keys, rows that are `apart` from each other, with R queries */
static void dot_products(const float *keys, long apart, Stretch s, const float *queries, float *scores, long R, long A) {
    Columns q = {queries, R, LANES};
    multiply(keys + s.prompt * apart, apart, 1, q, scores, R, s.shared, R, A, 0);
    multiply(keys + s.first * apart, apart, 1, q, scores + s.shared * R, R, s.keys, R, A, 0);
}

/* mixed (A, R): the sum of rows of keys or values, each times its score */
static void weighted_sum(const float *values, long apart, Stretch s, const float *scores, float *mixed, long R, long A) {
    Columns own = {scores + s.shared * R, R, LANES};
    multiply(values + s.first * apart, 1, apart, own, mixed, R, A, R, s.keys, 0);
    if (s.shared) multiply(values + s.prompt * apart, 1, apart, (Columns){scores, R, LANES}, mixed, R, A, R, s.shared, 1);
}

/* Add to the gradients of keys or values (S, W) the sum of rows of queries (R, W), each times its score */
static void add_gradients(const float *scores, Stretch s, const float *rows, float *to, long R, long W, long queries) {
    Columns q = {rows, W, LANES};
    multiply(scores, R, 1, q, to + s.prompt * W, W, s.shared, W, queries, 1);
    multiply(scores + s.shared * R, R, 1, q, to + s.first * W, W, s.keys, W, queries, 1);
}

/* The keys of its own answer that each of a vector of queries sees, counted from the first key of the stretch */
typedef struct {
    ints low, high;
    long shared;
} Window;

static Window window(const int64_t *starts, Stretch s, long G, long query) {
    Window w;
    for (long i = 0; i < LANES; i++) {
        long place = (query + i) / G, p = s.begin + (place < s.n ? place : s.n - 1);
        w.low[i] = (starts ? starts[p] : 0) - s.first + s.shared, w.high[i] = p - s.first + s.shared;
    }
    w.shared = s.shared;
    return w;
}

INLINE ints seen(Window w, long key) { return ((w.low <= (int)key) & (w.high >= (int)key)) | -(key < w.shared); }

/* starts (B, S): the first key of its own text that each position sees, null: the first of the row. prompts (B, S, 2): where
   the keys begin and end that it sees before, null: there are none. sums (B, M, S, G) are kept */
void attention_forward(const float *q, const float *k, const float *v, const int64_t *starts, const int64_t *prompts, float *out,
                       float *sums, long B, long S, long N, long M, long A) {
    long G = N / M, positions = positions_together(G), most = whole(positions * G), W = whole(A);
    float *rows = room(most * (3 * W + S)), *queries = rows + most * W, *mixed = queries + most * W, *scores = mixed + most * W;
    float root = 1 / sqrtf(A);
    for (long b = 0; b < B; b++, q += S * N * A, k += S * M * A, v += S * M * A, out += S * N * A) {
        for (long m = 0; m < M; m++, sums += S * G)
            for (long p = 0, n; p < S; p += n) {
                Stretch s = stretch(starts, prompts, p, S, positions);
                long R = whole(s.n * G), seen_keys = s.shared + s.keys;
                n = s.n;
                gather(q + m * G * A, s, N, G, A, root, rows);
                to_lanes(rows, R, A, queries);
                dot_products(k + m * A, M * A, s, queries, scores, R, A);
                float log_sums[R];
                lanes shares[R / LANES];
                for (long i = 0; i < R; i += LANES) {
                    Window w = window(starts, s, G, i);
                    lanes largest = all(-1e30f), sum = {0};
                    ints wrong = {0};
                    for (long j = 0; j < seen_keys; j++) {
                        lanes *score = (lanes *)(scores + j * R + i);
                        *score = either(seen(w, j), *score, all(-1e30f));
                        largest = larger(largest, *score);
                        wrong |= unsound(*score);
                    }
                    for (long j = 0; j < seen_keys; j++) {
                        lanes *score = (lanes *)(scores + j * R + i);
                        sum += *score = exponential(*score - largest);
                    }
                    sum = either(wrong, all(not_a_number()), sum);
                    shares[i / LANES] = 1 / sum;
                    for (long l = 0; l < LANES; l++) log_sums[i + l] = largest[l] + logf(sum[l]);
                }
                memcpy(sums + p * G, log_sums, s.n * G * sizeof *sums);
                weighted_sum(v + m * A, M * A, s, scores, mixed, R, A);
                for (long a = 0; a < A; a++)
                    for (long i = 0; i < R; i += LANES) *(lanes *)(mixed + a * R + i) *= shares[i / LANES];
                to_rows(mixed, R, A, rows);
                scatter(rows, s, N, G, A, 1, out + m * G * A);
            }
        starts += starts ? S : 0, prompts += prompts ? 2 * S : 0;
    }
    free(rows);
}

/* The gradients of q, k and v from dout (B, S, N, A) */
void attention_backward(const float *q, const float *k, const float *v, const int64_t *starts, const int64_t *prompts,
                        const float *sums, const float *dout, float *dq, float *dk, float *dv, long B, long S, long N, long M,
                        long A) {
    long G = N / M, positions = positions_together(G), most = whole(positions * G), W = whole(A);
    float *rows = room(most * (5 * W + 2 * S) + 2 * S * W), *grad_rows = rows + most * W, *queries = grad_rows + most * W;
    float *grad = queries + most * W, *mixed = grad + most * W, *scores = mixed + most * W, *dscores = scores + most * S;
    float *dkeys = dscores + most * S, *dvalues = dkeys + S * W, root = 1 / sqrtf(A);
    for (long b = 0; b < B; b++, starts += starts ? S : 0, prompts += prompts ? 2 * S : 0) {
        long at = b * S * N * A, kv = b * S * M * A;
        for (long m = 0; m < M; m++, sums += S * G) {
            memset(dkeys, 0, 2 * S * W * sizeof *dkeys);
            for (long p = 0, n; p < S; p += n) {
                Stretch s = stretch(starts, prompts, p, S, positions);
                long R = whole(s.n * G), seen_keys = s.shared + s.keys, head = kv + m * A;
                n = s.n;
                gather(q + at + m * G * A, s, N, G, A, root, rows);
                gather(dout + at + m * G * A, s, N, G, A, 1, grad_rows);
                to_lanes(rows, R, A, queries);
                to_lanes(grad_rows, R, A, grad);
                float log_sums[R];
                for (long i = 0; i < R; i++) log_sums[i] = sums[p * G + (i < s.n * G ? i : 0)];
                dot_products(k + head, M * A, s, queries, scores, R, A);
                dot_products(v + head, M * A, s, grad, dscores, R, A);
                for (long i = 0; i < R; i += LANES) {
                    Window w = window(starts, s, G, i);
                    lanes log_sum = *(lanes *)(log_sums + i), dot = {0};
                    for (long j = 0; j < seen_keys; j++) {
                        lanes *score = (lanes *)(scores + j * R + i);
                        *score = exponential(either(seen(w, j), *score - log_sum, all(-1e30f)));
                        dot += *score * *(lanes *)(dscores + j * R + i);
                    }
                    for (long j = 0; j < seen_keys; j++) {
                        lanes *dscore = (lanes *)(dscores + j * R + i);
                        *dscore = *(lanes *)(scores + j * R + i) * (*dscore - dot);
                    }
                }
                add_gradients(scores, s, grad_rows, dvalues, R, W, s.n * G);
                add_gradients(dscores, s, rows, dkeys, R, W, s.n * G);
                weighted_sum(k + head, M * A, s, dscores, mixed, R, A);
                to_rows(mixed, R, A, queries);
                scatter(queries, s, N, G, A, root, dq + at + m * G * A);
            }
            Stretch whole_row = {0, S, 0, 0, 0, S};
            scatter(dkeys, whole_row, M, 1, A, 1, dk + kv + m * A);
            scatter(dvalues, whole_row, M, 1, A, 1, dv + kv + m * A);
        }
    }
    free(rows);
}
