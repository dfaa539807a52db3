/* The routed experts of a layer with their backward pass, and the unit of every MLP, silu(gate) * up.

   The twin of minglm/kernels/experts/grouped.py, where the equations are; minglm/kernels/cpu/experts.py calls it. Row i of
   `hidden` belongs to pair order[i], that is token order[i] / K. Rows are computed BLOCK at a time: what lies between the
   products stays in a core's cache. All arrays are contiguous. */

#include "product.h"
#include <stdlib.h>

enum { BLOCK = 64 };

/* Sort the pairs of experts (pairs,) by expert, in order of tokens within each: pair order[i] is row i, and expert e has rows
   ends[e] to ends[e + 1] */
void sort_pairs(const int64_t *experts, int64_t *order, int64_t *ends, long pairs, long E) {
    int64_t at[E];
    memset(ends, 0, (E + 1) * sizeof *ends);
    for (long j = 0; j < pairs; j++) ends[experts[j] + 1]++;
    for (long e = 0; e < E; e++) at[e] = ends[e], ends[e + 1] += ends[e];
    for (long j = 0; j < pairs; j++) order[at[experts[j]]++] = j;
}

/* Copy n rows of x (T, D), those of some pairs, to rows of whole vectors */
static void gather(const float *x, const int64_t *order, long at, long n, long K, long D, float *to) {
    for (long r = 0; r < n; r++) {
        const float *from = x + order[at + r] / K * D;
        memcpy(to + r * whole(D), from, D * sizeof *to);
    }
}

/* Add n rows to those of y (T, D) */
static void scatter(const float *from, const int64_t *order, long at, long n, long K, long D, float *y) {
    for (long r = 0; r < n; r++) {
        float *to = y + order[at + r] / K * D;
        for (long d = 0; d < D; d++) to[d] += from[r * whole(D) + d];
    }
}

/* Compute y (T, D), which holds zeros, and keep gate x and up x in hidden (pairs, 2 W), each filled up to W whole vectors */
void experts_forward(const float *x, const int64_t *order, const int64_t *ends, const float *weights, const float *gate,
                     const float *up, const float *down, float *hidden, float *y, long K, long E, long D, long F) {
    long W = whole(F), wide = whole(D);
    float *rows = room(BLOCK * (2 * wide + W) + D * 2 * W + F * wide), *out = rows + BLOCK * wide, *a = out + BLOCK * wide;
    float *gates = a + BLOCK * W, *ups = gates + D * W, *downs = ups + D * W;
    for (long e = 0; e < E; e++) {
        if (ends[e] == ends[e + 1]) continue;
        Columns gate_e = columns_of(gate + e * F * D, 1, D, D, F, gates), up_e = columns_of(up + e * F * D, 1, D, D, F, ups);
        Columns down_e = columns_of(down + e * D * F, 1, F, F, D, downs);
        for (long at = ends[e], n; at < ends[e + 1]; at += n) {
            n = ends[e + 1] - at < BLOCK ? ends[e + 1] - at : BLOCK;
            float *g = hidden + at * 2 * W;
            gather(x, order, at, n, K, D, rows);
            multiply(rows, wide, 1, gate_e, g, 2 * W, n, W, D, 0);
            multiply(rows, wide, 1, up_e, g + W, 2 * W, n, W, D, 0);
            for (long r = 0; r < n; r++, g += 2 * W) {
                float weight = weights[order[at + r]];
                for (long i = 0; i < W; i += LANES) {
                    lanes value = *(lanes *)(g + i);
                    *(lanes *)(a + r * W + i) = weight * value * *(lanes *)(g + W + i) / (1 + exponential(-value));
                }
            }
            multiply(a, W, 1, down_e, out, wide, n, wide, F, 0);
            scatter(out, order, at, n, K, D, y);
        }
    }
    free(rows);
}

/* From the gradient dy (T, D) compute those of x, of the weights and of the matrices; all but dweights (pairs,) hold zeros */
void experts_backward(const float *x, const int64_t *order, const int64_t *ends, const float *weights, const float *gate,
                      const float *up, const float *down, const float *hidden, const float *dy, float *dx, float *dweights,
                      float *dgate, float *dup, float *ddown, long K, long E, long D, long F) {
    long W = whole(F), wide = whole(D);
    float *rows = room(BLOCK * (3 * wide + 3 * W) + 3 * D * W + 2 * F * wide), *drows = rows + BLOCK * wide;
    float *out = drows + BLOCK * wide, *a = out + BLOCK * wide, *dg = a + BLOCK * W, *du = dg + BLOCK * W;
    float *gates = du + BLOCK * W, *ups = gates + F * wide, *downs = ups + F * wide;
    for (long e = 0; e < E; e++) {
        if (ends[e] == ends[e + 1]) continue;
        long first = e * F * D;
        Columns gate_e = columns_of(gate + first, D, 1, F, D, gates), up_e = columns_of(up + first, D, 1, F, D, ups);
        Columns down_e = columns_of(down + first, F, 1, D, F, downs);
        for (long at = ends[e], n; at < ends[e + 1]; at += n) {
            n = ends[e + 1] - at < BLOCK ? ends[e + 1] - at : BLOCK;
            gather(x, order, at, n, K, D, rows);
            gather(dy, order, at, n, K, D, drows);
            multiply(drows, wide, 1, down_e, du, W, n, W, D, 0);
            for (long r = 0; r < n; r++) {
                const float *g = hidden + (at + r) * 2 * W;
                float weight = weights[order[at + r]];
                lanes dweight = {0};
                for (long i = 0; i < W; i += LANES) {
                    lanes value = *(lanes *)(g + i), u = *(lanes *)(g + W + i);
                    lanes share = 1 / (1 + exponential(-value)), silu = value * share, da = *(lanes *)(du + r * W + i);
                    dweight += da * silu * u;
                    da *= weight;
                    *(lanes *)(a + r * W + i) = weight * silu * u;
                    *(lanes *)(du + r * W + i) = da * silu;
                    *(lanes *)(dg + r * W + i) = da * u * (share + silu * (1 - share));
                }
                dweights[order[at + r]] = sum_of(dweight);
            }
            multiply(drows, 1, wide, (Columns){a, W, LANES}, ddown + first, F, D, F, n, 1);
            multiply(dg, 1, W, (Columns){rows, wide, LANES}, dgate + first, D, F, D, n, 1);
            multiply(du, 1, W, (Columns){rows, wide, LANES}, dup + first, D, F, D, n, 1);
            multiply(dg, W, 1, gate_e, out, wide, n, wide, F, 0);
            multiply(du, W, 1, up_e, out, wide, n, wide, F, 1);
            scatter(out, order, at, n, K, D, dx);
        }
    }
    free(rows);
}

/* out = silu(gate) up, of n numbers */
void swiglu_forward(const float *gate, const float *up, float *out, long n) {
    for (long i = 0; i < n; i += LANES) {
        lanes g = some(gate + i, n - i), u = some(up + i, n - i);
        put(g * u / (1 + exponential(-g)), out + i, n - i);
    }
}

/* From the gradient of silu(gate) up compute those of gate and up */
void swiglu_backward(const float *gate, const float *up, const float *dout, float *dgate, float *dup, long n) {
    for (long i = 0; i < n; i += LANES) {
        lanes g = some(gate + i, n - i), u = some(up + i, n - i), d = some(dout + i, n - i);
        lanes share = 1 / (1 + exponential(-g)), silu = g * share;
        put(d * silu, dup + i, n - i);
        put(d * u * (share + silu * (1 - share)), dgate + i, n - i);
    }
}
