/* GLM-4.5's decoder layers over a paged cache, and its output head, in float32: what generation on a CPU runs.

   One call takes the tokens of a pass through all layers. From Python, operation by operation, one token for each of a few
   answers is a thousand calls on vectors that fit in a core's first cache, and the calls cost several times what their
   arithmetic does. The reference is minglm/model; minglm/inference/cpu_decoder.py packs its weights and calls this. Letters
   of axes are those of minglm/__init__.py.

   The order in which a number of a token is computed depends only on that token and the text before it: not on the other
   tokens of the pass, nor on the number of threads. So an answer has the same bits in any batch. */

#include "router.h"
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>

typedef struct { /* matrices are packed: (outputs / LANES, inputs, LANES), zeros after the last output */
    const float *input_norm, *qkv, *qkv_bias, *q_norm, *k_norm, *o, *post_norm; /* null where the model has none */
    const float *router, *router_bias, *gate_up, *down;                        /* (E, ...) each of the last two */
    const float *dense_gate_up, *dense_down; /* of the shared expert, or of a layer without experts */
    float *store;                            /* (blocks, M, values (size, A) and then keys (A, whole size)) */
    long dense;                              /* width */
} Layer;

typedef struct {
    const Layer *layers;
    float *x;                                          /* (T, D): first the embeddings, at the end the states */
    const float *cosine, *sine;                        /* (positions, half) */
    const int64_t *positions, *rows, *tables;          /* (T,); (T,) each token's row of the tables (rows, blocks) */
    const float *norm, *head;                          /* of the output */
    const int64_t *wanted;                             /* (logit_rows,) the tokens whose logits (logit_rows, V) are */
    float *logits, *scratch;                           /* per_token for each token, and per_thread for each thread */
    int64_t *chosen;                                   /* (T, L, K) the experts of each token; null: not wanted */
    long layer_count, T, D, N, M, A, half, blocks, size, first, E, K, F, normalize, logit_rows, V, L;
    long threads, per_token, per_thread;
    float eps, scale;
    atomic_long ready, arrived;
} Pass;

enum { CHUNK = 64 }; /* rows of a product together: they stay in a core's first cache, beside a panel of the matrix */

/* out[r] += W x[r], for R rows and C vectors of outputs: the sums stay in registers */
INLINE void tile(int R, int C, const float *const *x, float *const *out, const float *w, long at, long outputs, long inputs) {
    lanes sum[ROWS][3] = {{{0}}};
    for (long d = 0; d < inputs; d++, w += LANES) {
        lanes column[3];
#pragma GCC unroll 3
        for (int c = 0; c < C; c++) column[c] = loaded(w + c * inputs * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 3
            for (int c = 0; c < C; c++) sum[r][c] += x[r][d] * column[c];
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 3
        for (int c = 0; c < C; c++) {
            long o = at + c * LANES;
            if (o + LANES <= outputs) *(lanes *)(out[r] + o) += sum[r][c];
            else
                for (long i = 0; o + i < outputs; i++) out[r][o + i] += sum[r][c][i];
        }
}

#define TILES(R)                                                                                                       \
    case R:                                                                                                            \
        if (wide) tile(R, 3, x + r, out + r, w, at, outputs, inputs);                                                  \
        else tile(R, 1, x + r, out + r, w, at, outputs, inputs);                                                       \
        break;

/* out[r] += W x[r] for any number of rows, wherever each of them is, and all outputs of a packed matrix */
static void product(const float *const *x, float *const *out, const float *w, long rows, long outputs, long inputs) {
    for (long at = 0, wide; at < outputs; at += (wide ? 3 : 1) * LANES, w += (wide ? 3 : 1) * LANES * inputs) {
        wide = outputs - at > 2 * LANES;
        for (long r = 0; r < rows; r += ROWS)
            switch (rows - r < ROWS ? rows - r : ROWS) {
                TILES(1) TILES(2) TILES(3) TILES(4)
#ifdef __AVX512F__
                TILES(5) TILES(6) TILES(7) TILES(8)
#endif
            }
    }
}

/* out += x W' for rows that are contiguous */
static void product_rows(const float *x, float *out, const float *w, long rows, long outputs, long inputs) {
    const float *from[CHUNK];
    float *to[CHUNK];
    for (long at = 0, n; at < rows; at += n) {
        n = rows - at < CHUNK ? rows - at : CHUNK;
        for (long r = 0; r < n; r++) from[r] = x + (at + r) * inputs, to[r] = out + (at + r) * outputs;
        product(from, to, w, n, outputs, inputs);
    }
}

/* out[r] += down( weight[r] * silu(gate x[r]) * up x[r] ) for at most CHUNK rows; gate and up are one matrix, each filled
   up to whole vectors; hidden: room for that many rows of both */
static void swiglu(const float *const *x, float *const *out, const float *weight, const float *gate_up, const float *down,
                   float *hidden, long rows, long D, long F) {
    float *to[CHUNK];
    long W = whole(F);
    memset(hidden, 0, rows * 2 * W * sizeof *hidden);
    for (long r = 0; r < rows; r++) to[r] = hidden + r * 2 * W;
    product(x, to, gate_up, rows, 2 * W, D);
    for (long r = 0; r < rows; r++)
        for (long i = 0; i < W; i += LANES) {
            lanes *gate = (lanes *)(to[r] + i);
            *gate *= weight[r] * *(lanes *)(to[r] + W + i) / (1 + exponential(-*gate));
        }
    product((const float *const *)to, out, down, rows, D, F);
}

static void norm(const float *x, const float *weight, float *out, long n, float eps) {
    float square = 0;
    for (long i = 0; i < n; i++) square += x[i] * x[i];
    float scale = 1 / sqrtf(square / n + eps);
    for (long i = 0; i < n; i++) out[i] = x[i] * scale * weight[i];
}

static void norm_and_rotate(float *x, const float *weight, const float *cosine, const float *sine, long A, long half, float eps) {
    if (weight) norm(x, weight, x, A, eps);
    for (long i = 0; i < half; i++) {
        float a = x[i], b = x[i + half];
        x[i] = a * cosine[i] - b * sine[i];
        x[i + half] = b * cosine[i] + a * sine[i];
    }
}

/* Norm and rotate the queries and keys of a thread's tokens (T, N + 2 M, A), and write their keys and values to the store */
static void store_keys_values(const Pass *p, const Layer *l, float *qkv, long first, long T) {
    long A = p->A, W = whole(p->size);
    for (long t = first; t < first + T; t++) {
        long position = p->positions[t], slot = position % p->size;
        const float *cosine = p->cosine + position * p->half, *sine = p->sine + position * p->half;
        float *to = l->store + p->tables[p->rows[t] * p->blocks + position / p->size] * p->M * A * (p->size + W);
        for (long n = 0; n < p->N; n++, qkv += A) norm_and_rotate(qkv, l->q_norm, cosine, sine, A, p->half, p->eps);
        for (long m = 0; m < p->M; m++, qkv += A, to += A * (p->size + W)) {
            norm_and_rotate(qkv, l->k_norm, cosine, sine, A, p->half, p->eps);
            memcpy(to + slot * A, qkv + p->M * A, A * sizeof *to);
            for (long a = 0; a < A; a++) to[p->size * A + a * W + slot] = qkv[a];
        }
        qkv += p->M * A;
    }
}

/* Compute the scores (H, C) of up to four query heads, one vector of slots after the other, over blocks of keys (A, W), and the
   largest score of each head, which is no number where a score is none or infinite */
INLINE void score(int H, const Pass *p, const float *store, const float *const *q, const int64_t *table, long position, long C,
                  float *scores, float *largest) {
    long A = p->A, size = p->size, W = whole(size), stop = (position / size + 1) * W;
    float root = 1 / sqrtf(A);
    lanes most[4];
    ints wrong[4] = {{0}};
    for (int i = 0; i < H; i++) most[i] = all(-1e30f);
    for (long at = 0; at < stop; at += 2 * LANES) { /* two vectors of slots together: eight sums, none waits for another */
        long here[2] = {at, at + LANES < stop ? at + LANES : at};
        const float *key[2];
        lanes sum[2][4] = {{{0}}};
        for (int j = 0; j < 2; j++)
            key[j] = store + table[here[j] / W] * p->M * A * (size + W) + size * A + here[j] % W;
        for (long a = 0; a < A; a++) {
            lanes column[2] = {loaded(key[0] + a * W), loaded(key[1] + a * W)};
#pragma GCC unroll 4
            for (int i = 0; i < H; i++)
#pragma GCC unroll 2
                for (int j = 0; j < 2; j++) sum[j][i] += q[i][a] * column[j];
        }
        for (int j = 0; j < 2; j++) {
            ints inside = lane() + (int)(here[j] % W), slot = inside + (int)(here[j] / W * size);
            ints seen = (inside < (int)size) & (slot <= (int)position) & (slot >= (int)p->first);
            for (int i = 0; i < H; i++) {
                lanes s = either(seen, sum[j][i] * root, all(-1e30f));
                most[i] = larger(most[i], s);
                wrong[i] |= unsound(s);
                *(lanes *)(scores + i * C + at + j * LANES) = s;
            }
        }
    }
    for (int i = 0; i < H; i++) largest[i] = some_true(wrong[i]) ? not_a_number() : largest_of(most[i]);
}

/* out[i] = share[i] * sum over slots of scores[i] times the values (size, A) of each block; a null out[i] is not wanted */
INLINE void add_values(int H, const Pass *p, const float *store, const int64_t *table, long position, long C, const float *scores,
                       const float *share, float *const *out) {
    long A = p->A, size = p->size, W = whole(size);
    for (long v = 0; v < A; v += 2 * LANES) { /* two vectors of a value; what lies beyond A belongs to others */
        long other = v + LANES < A ? LANES : 0;
        lanes sum[2][4] = {{{0}}};
        for (long b = 0; b <= position / size; b++) {
            const float *value = store + table[b] * p->M * A * (size + W) + v, *s = scores + b * W;
            long slots = position + 1 - b * size < size ? position + 1 - b * size : size;
            for (long c = 0; c < slots; c++, value += A) {
                lanes part[2] = {loaded(value), loaded(value + other)};
#pragma GCC unroll 4
                for (int i = 0; i < H; i++)
#pragma GCC unroll 2
                    for (int j = 0; j < 2; j++) sum[j][i] += s[i * C + c] * part[j];
            }
        }
        for (int i = 0; i < H && out[i]; i++)
            for (long j = 0, n; j < 2 && (n = A - v - j * LANES) > 0; j++) {
                lanes y = sum[j][i] * share[i];
                memcpy(out[i] + v + j * LANES, &y, (n < LANES ? n : LANES) * sizeof(float));
            }
    }
}

/* Attend with the query heads g to g + H of a token, of the G that share a key head. scores: H * C floats */
INLINE void attend_together(int H, const Pass *p, const float *store, const float *q, const int64_t *table, long position,
                            long g, float *out, float *scores) {
    long A = p->A, G = p->N / p->M, slots = (position / p->size + 1) * whole(p->size), C = slots + LANES;
    const float *head[4];
    float *to[4], largest[4], share[4];
    for (long i = 0; i < H; i++) {
        head[i] = q + (g + i < G ? g + i : g) * A;
        to[i] = g + i < G ? out + (g + i) * A : 0;
    }
    score(H, p, store, head, table, position, C, scores, largest);
    for (int i = 0; i < H; i++) {
        lanes total = {0};
        for (lanes *s = (lanes *)(scores + i * C); (float *)s < scores + i * C + slots; s++)
            total += *s = exponential(*s - largest[i]);
        share[i] = 1 / (unsound(all(largest[i]))[0] ? not_a_number() : sum_of(total));
    }
    add_values(H, p, store, table, position, C, scores, share, to);
}

/* Attend for one token, q and out (N, A); heads that share keys go in fours, or in twos. scores: 4 * (blocks * W + LANES)
   floats */
static void attend(const Pass *p, const float *store, const float *q, const int64_t *table, long position, float *out,
                   float *scores) {
    long A = p->A, G = p->N / p->M;
    for (long m = 0; m < p->M; m++, store += A * (p->size + whole(p->size)), q += G * A, out += G * A)
        for (long g = 0; g < G; g += 4)
            if (G - g > 2) attend_together(4, p, store, q, table, position, g, out, scores);
            else attend_together(2, p, store, q, table, position, g, out, scores);
}

/* Replace the logits of a token by their sigmoids, and select its experts with their weights; logits: E in whole vectors */
static void route(const Pass *p, const float *bias, float *logits, int64_t *experts, float *weights) {
    float total = 1e-20f;
    for (long e = 0; e < p->E; e += LANES) *(lanes *)(logits + e) = 1 / (1 + exponential(-*(lanes *)(logits + e)));
    select_experts(logits, bias, experts, p->E, p->K);
    for (long k = 0; k < p->K; k++) weights[k] = logits[experts[k]], total += weights[k];
    for (long k = 0; k < p->K; k++) weights[k] *= p->normalize ? p->scale / total : p->scale;
}

/* x += experts(normed), each expert on the tokens that chose it; then x += dense(normed), the shared expert. chosen: where
   to write the K experts of the first token, L * K numbers before those of the next; null: nowhere */
static void feed_forward(const Pass *p, const Layer *l, const float *normed, float *x, int64_t *chosen, long T,
                         float *scratch) {
    long D = p->D, E = whole(p->E), K = p->K;
    const float *from[CHUNK];
    float *to[CHUNK], weight[CHUNK];
    if (l->router) {
        float *logits = scratch, *weights = logits + T * E;
        int64_t *experts = (int64_t *)(weights + whole(T * K)), *order = experts + T * K, ends[p->E + 1];
        memset(ends, 0, sizeof ends);
        memset(logits, 0, T * E * sizeof *logits);
        scratch = (float *)(order + T * K);
        product_rows(normed, logits, l->router, T, E, D);
        for (long t = 0; t < T; t++) route(p, l->router_bias, logits + t * E, experts + t * K, weights + t * K);
        for (long t = 0; t < T && chosen; t++) memcpy(chosen + t * p->L * K, experts + t * K, K * sizeof *chosen);
        for (long j = 0; j < T * K; j++) ends[experts[j] + 1]++;
        for (long e = 0; e < p->E; e++) ends[e + 1] += ends[e];
        for (long j = 0; j < T * K; j++) order[ends[experts[j]]++] = j; /* ends[e] has now moved to where e ends */
        for (long e = 0, at = 0, n; e < p->E; e++)
            for (; at < ends[e]; at += n) {
                n = ends[e] - at < CHUNK ? ends[e] - at : CHUNK;
                for (long r = 0; r < n; r++) {
                    long j = order[at + r], t = j / K;
                    from[r] = normed + t * D, to[r] = x + t * D, weight[r] = weights[j];
                }
                swiglu(from, to, weight, l->gate_up + e * 2 * whole(p->F) * D, l->down + e * whole(D) * p->F, scratch, n, D,
                       p->F);
            }
    }
    for (long at = 0, n; l->dense && at < T; at += n) {
        n = T - at < CHUNK ? T - at : CHUNK;
        for (long r = 0; r < n; r++) from[r] = normed + (at + r) * D, to[r] = x + (at + r) * D, weight[r] = 1;
        swiglu(from, to, weight, l->dense_gate_up, l->dense_down, scratch, n, D, l->dense);
    }
}

/* Wait until every thread has been here `times` times. */
static void barrier(Pass *p, long times) {
    atomic_fetch_add(&p->arrived, 1);
    while (atomic_load(&p->arrived) < times * p->threads) sched_yield();
}

typedef struct {
    Pass *pass;
    long index;
} Share;

/* Compute one thread's share: tokens first to first + T. Threads wait for each other only where a token reads what another
   one writes. */
static void *work(void *share) {
    Pass *p = ((Share *)share)->pass;
    while (!atomic_load(&p->ready)) sched_yield();
    long index = ((Share *)share)->index, first = p->T * index / p->threads, T = p->T * (index + 1) / p->threads - first;
    long D = p->D, A = p->A, heads = p->N + 2 * p->M, wide = whole(T * D);
    float *x = p->x + first * D, *normed = p->scratch + first * p->per_token + index * p->per_thread;
    float *qkv = normed + wide, *mixed = qkv + whole(T * heads * A), *scratch = mixed + whole(T * p->N * A);
    int64_t *chosen = p->chosen ? p->chosen + first * p->L * p->K : 0;
    for (long i = 0; i < p->layer_count; i++) {
        const Layer *l = p->layers + i;
        for (long t = 0; t < T; t++) norm(x + t * D, l->input_norm, normed + t * D, D, p->eps);
        for (long t = 0; t < T && l->qkv_bias; t++) memcpy(qkv + t * heads * A, l->qkv_bias, heads * A * sizeof *qkv);
        if (!l->qkv_bias) memset(qkv, 0, T * heads * A * sizeof *qkv);
        product_rows(normed, qkv, l->qkv, T, heads * A, D);
        store_keys_values(p, l, qkv, first, T);
        barrier(p, i + 1);
        for (long t = 0; t < T; t++)
            attend(p, l->store, qkv + t * heads * A, p->tables + p->rows[first + t] * p->blocks, p->positions[first + t],
                   mixed + t * p->N * A, scratch);
        product_rows(mixed, x, l->o, T, D, p->N * A);
        for (long t = 0; t < T; t++) norm(x + t * D, l->post_norm, normed + t * D, D, p->eps);
        feed_forward(p, l, normed, x, chosen, T, scratch);
        if (chosen && l->router) chosen += p->K;
    }
    for (long t = 0; t < T; t++) norm(x + t * D, p->norm, x + t * D, D, p->eps);
    barrier(p, p->layer_count + 1);
    for (long at = p->logit_rows * index / p->threads, n; (n = p->logit_rows * (index + 1) / p->threads - at) > 0; at += n) {
        const float *from[CHUNK];
        float *to[CHUNK];
        n = n < CHUNK ? n : CHUNK;
        for (long r = 0; r < n; r++) from[r] = p->x + p->wanted[at + r] * D, to[r] = p->logits + (at + r) * p->V;
        memset(to[0], 0, n * p->V * sizeof(float));
        product(from, to, p->head, n, p->V, D);
    }
    return 0;
}

/* Compute a pass on p->threads threads, or on as many as the system gives. */
void decode(Pass *p) {
    Share shares[p->threads];
    pthread_t threads[p->threads];
    long count = 1;
    shares[0] = (Share){p, 0};
    for (; count < p->threads; count++) {
        shares[count] = (Share){p, count};
        if (pthread_create(threads + count, 0, work, shares + count)) break;
    }
    p->threads = count;
    atomic_store(&p->ready, 1);
    work(shares);
    for (long i = 1; i < count; i++) pthread_join(threads[i], 0);
}

const long vector_lanes = LANES;
