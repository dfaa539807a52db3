/* Small operations on a CPU, float32: those of generation, each in one pass over its data, and Muon's Newton-Schulz.

   Decoding one token for each of a few answers is hundreds of operations on vectors that fit in a core's first cache;
   called one by one from Python they cost far more than their arithmetic. Each function here is the twin of a plain
   form in Python, named above it, and `minglm/kernels/cpu.py` compiles, loads and calls them. Large matrix products
   stay with PyTorch. All arrays are contiguous; letters of axes are those of `minglm/__init__.py`. */

#include <math.h>
#include <stdint.h>
#include <string.h>

typedef float lanes __attribute__((vector_size(32), aligned(4)));
typedef float four __attribute__((vector_size(16), aligned(4)));
typedef int mask __attribute__((vector_size(16)));
enum { LANES = 8, PANEL = 16, STRETCH = 64 };

static float dot(const float *a, const float *b, long n) {
    float sum = 0;
    for (long i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

static float rms_scale(const float *x, long n, float eps) { return 1 / sqrtf(dot(x, x, n) / n + eps); }

/* kernels/norm.py: sum = x + change, out = weight * sum / rms; change and sum may be null */
void add_norm(const float *x, const float *change, const float *weight, float *out, float *sum, long T, long D, float eps) {
    for (long t = 0; t < T; t++, x += D, out += D) {
        const float *r = x;
        if (change) {
            for (long i = 0; i < D; i++) sum[i] = x[i] + change[i];
            r = sum, sum += D, change += D;
        }
        float scale = rms_scale(r, D, eps);
        for (long i = 0; i < D; i++) out[i] = r[i] * scale * weight[i];
    }
}

/* kernels/qk_norm_rope.py, for queries or keys: x (T, N, A) in place; weight may be null; cos, sin (T, half) */
void norm_rope(float *x, const float *weight, const float *cosine, const float *sine, long T, long N, long A, long half,
               float eps) {
    for (long t = 0; t < T; t++, cosine += half, sine += half)
        for (long n = 0; n < N; n++, x += A) {
            if (weight) {
                float scale = rms_scale(x, A, eps);
                for (long i = 0; i < A; i++) x[i] *= scale * weight[i];
            }
            for (long i = 0; i < half; i++) {
                float a = x[i], b = x[i + half];
                x[i] = a * cosine[i] - b * sine[i];
                x[i + half] = b * cosine[i] + a * sine[i];
            }
        }
}

/* kernels/router_topk.py: the K largest of sigmoid(logits) + bias, ties to the lower index; scores (T, E) */
void router_topk(const float *logits, const float *bias, int64_t *experts, float *weights, float *scores, long T, long E,
                 long K, int normalize, float scale) {
    for (long t = 0; t < T; t++, logits += E, scores += E, experts += K, weights += K) {
        for (long e = 0; e < E; e += LANES) { /* whole vectors only, or equal logits at the end would not tie */
            float part[LANES] = {0};
            for (long i = 0; i < LANES && e + i < E; i++) part[i] = logits[e + i];
            for (long i = 0; i < LANES; i++) part[i] = 1 / (1 + expf(-part[i]));
            for (long i = 0; i < LANES && e + i < E; i++) scores[e + i] = part[i];
        }
        float total = 1e-20f;
        for (long k = 0; k < K; k++) {
            long best = -1;
            for (long e = 0; e < E; e++) {
                int taken = 0;
                for (long j = 0; j < k; j++) taken |= experts[j] == e;
                if (!taken && (best < 0 || scores[e] + bias[e] > scores[best] + bias[best])) best = e;
            }
            experts[k] = best, weights[k] = scores[best];
            total += weights[k];
        }
        for (long k = 0; k < K; k++) weights[k] *= normalize ? scale / total : scale;
    }
}

/* inference/pages.py: puts keys and values (T, M, A) where `written` says, (T, parts * M) rows of the store (..., A) */
void keep(const float *k, const float *v, const int64_t *written, float *store, long T, long M, long A) {
    for (long t = 0; t < T; t++) {
        for (long m = 0; m < M; m++, k += A) memcpy(store + *written++ * A, k, A * sizeof *k);
        for (long m = 0; v && m < M; m++, v += A) memcpy(store + *written++ * A, v, A * sizeof *v);
    }
}

/* y (outputs, P) = w (outputs, depth) times x (depth, P): x is a panel of tokens that stand next to each other, so the
   matrix is read as training stores it, a broadcast number at a time, and sums stay in registers */
#define PRODUCT(NAME, P, ROWS)                                                                                         \
    static void NAME(const float *w, const float *x, float *y, long outputs, long depth) {                             \
        long o = 0;                                                                                                    \
        for (; o + ROWS <= outputs; o += ROWS) {                                                                       \
            lanes sum[ROWS][P / LANES] = {{{0}}};                                                                      \
            for (long d = 0; d < depth; d++)                                                                           \
                for (int r = 0; r < ROWS; r++)                                                                         \
                    for (int p = 0; p < P / LANES; p++)                                                                \
                        sum[r][p] += w[(o + r) * depth + d] * ((const lanes *)(x + d * P))[p];                         \
            memcpy(y + o * P, sum, sizeof sum);                                                                        \
        }                                                                                                              \
        for (; o < outputs; o++) {                                                                                     \
            lanes sum[P / LANES] = {{0}};                                                                              \
            for (long d = 0; d < depth; d++)                                                                           \
                for (int p = 0; p < P / LANES; p++) sum[p] += w[o * depth + d] * ((const lanes *)(x + d * P))[p];      \
            memcpy(y + o * P, sum, sizeof sum);                                                                        \
        }                                                                                                              \
    }
PRODUCT(product_wide, PANEL, 6)
PRODUCT(product_narrow, LANES, 12)

static void product_one(const float *w, const float *x, float *y, long outputs, long depth) {
    for (long o = 0; o < outputs; o++) y[o] = dot(w + o * depth, x, depth);
}

/* kernels/grouped_gemm.py, experts_loop: y (T, D) is overwritten; order (T * K), scratch (2 * D + 2 * F) * PANEL */
void experts(const float *x, const int64_t *chosen, const float *weights, const float *gate, const float *up,
             const float *down, float *y, int64_t *order, float *scratch, long T, long K, long E, long D, long F) {
    float *xt = scratch, *yt = xt + D * PANEL, *g = yt + D * PANEL, *u = g + F * PANEL;
    int64_t ends[E + 1];
    memset(ends, 0, sizeof ends);
    for (long i = 0; i < T * K; i++) ends[chosen[i] + 1]++;
    for (long e = 0; e < E; e++) ends[e + 1] += ends[e];
    for (long i = 0; i < T * K; i++) order[ends[chosen[i]]++] = i; /* ends[e] has now moved to where e ends */
    memset(y, 0, T * D * sizeof *y);
    for (long e = 0, at = 0; e < E; e++)
        while (at < ends[e]) {
            long rows = ends[e] - at < PANEL ? ends[e] - at : PANEL, P = rows > LANES ? PANEL : rows > 1 ? LANES : 1;
            void (*product)(const float *, const float *, float *, long, long) =
                P == PANEL ? product_wide : P == LANES ? product_narrow : product_one;
            float weight[PANEL] = {0};
            for (long p = 0; p < P; p++) {
                const float *row = p < rows ? x + order[at + p] / K * D : 0;
                for (long d = 0; d < D; d++) xt[d * P + p] = row ? row[d] : 0;
                if (row) weight[p] = weights[order[at + p]];
            }
            product(gate + e * F * D, xt, g, F, D);
            product(up + e * F * D, xt, u, F, D);
            for (long i = 0; i < F * P; i++) g[i] *= u[i] / (1 + expf(-g[i]));
            product(down + e * D * F, g, yt, D, F);
            for (long p = 0; p < rows; p++) {
                float *out = y + order[at + p] / K * D;
                for (long d = 0; d < D; d++) out[d] += weight[p] * yt[d * P + p];
            }
            at += rows;
        }
}

/* scores (slots, 4 * fours) of up to four neighbouring keys: four sums at a time, none waiting for another */
static void score(const float *qt, const float *k, four *scores, long slots, long fours, long A) {
    const float *key[4];
    for (long i = 0; i < 4; i++) key[i] = k + (i < slots ? i : 0) * A;
    for (long f = 0; f < fours; f++) {
        four sum[4] = {{0}};
        for (long a = 0; a < A; a++)
            for (long i = 0; i < 4; i++) sum[i] += key[i][a] * ((const four *)qt)[a * fours + f];
        for (long i = 0; i < slots; i++) scores[i * fours + f] = sum[i];
    }
}

/* sums (4 * fours, A) += scores' (4 * fours, slots) times v (slots, A) */
static void add_values(const float *scores, const float *v, float *sums, long slots, long fours, long A) {
    for (long f = 0; f < fours; f++, sums += 4 * A) {
        const float *p = scores + 4 * f;
        long a = 0;
        for (; a + LANES <= A; a += LANES) {
            lanes sum[4];
            for (long i = 0; i < 4; i++) sum[i] = *(lanes *)(sums + i * A + a);
            for (long c = 0; c < slots; c++)
                for (long i = 0; i < 4; i++) sum[i] += p[c * 4 * fours + i] * *(const lanes *)(v + c * A + a);
            for (long i = 0; i < 4; i++) *(lanes *)(sums + i * A + a) = sum[i];
        }
        for (; a < A; a++)
            for (long c = 0; c < slots; c++)
                for (long i = 0; i < 4; i++) sums[i * A + a] += p[c * 4 * fours + i] * v[c * A + a];
    }
}

static void softmax(four *scores, long slots, long fours) { /* over slots, for each of 4 * fours heads */
    float *p = (float *)scores;
    for (long f = 0; f < fours; f++) {
        four largest = scores[f];
        for (long c = 1; c < slots; c++) {
            four x = scores[c * fours + f];
            mask larger = x > largest;
            largest = (four)((larger & (mask)x) | (~larger & (mask)largest));
        }
        for (long c = 0; c < slots; c++) scores[c * fours + f] -= largest;
    }
    for (long i = 0; i < slots * fours * 4; i++) p[i] = expf(p[i]);
    for (long f = 0; f < fours; f++) {
        four total = {0};
        for (long c = 0; c < slots; c++) total += scores[c * fours + f];
        for (long c = 0; c < slots; c++) scores[c * fours + f] /= total;
    }
}

/* kernels/paged_attention.py: q, out (B, S, N, A); rows (parts, B, M, blocks) of the store (..., size, A); slots from
   `first` to the position of each query. The G heads that share keys stand next to each other in groups of four, so one
   pass over the keys serves them all and no sum runs across a vector. scratch: (blocks * size + 2 * A) * (G + 3) floats */
void paged_attention(const float *q, const float *store, const int64_t *rows, const int64_t *positions, float *out,
                     float *scratch, long B, long S, long N, long M, long A, long blocks, long size, long parts,
                     long first) {
    long G = N / M, fours = (G + 3) / 4, W = 4 * fours;
    float *qt = scratch, *sums = qt + A * W, *scores = sums + A * W, root = 1 / sqrtf(A);
    for (long b = 0; b < B; b++)
        for (long s = 0; s < S; s++, positions++)
            for (long m = 0; m < M; m++, q += G * A, out += G * A) {
                const int64_t *keys = rows + (b * M + m) * blocks, *values = keys + (parts - 1) * B * M * blocks;
                long stop = *positions + 1 < blocks * size ? *positions + 1 : blocks * size;
                for (long a = 0; a < A; a++)
                    for (long g = 0; g < W; g++) qt[a * W + g] = g < G ? q[g * A + a] * root : 0;
                for (long c = 0; c < stop; c++) {
                    long end = c + size < stop ? c + size : stop; /* a block, and within it four slots at a time */
                    for (const float *k = store + *keys++ * size * A; c < end; c += 4, k += 4 * A)
                        score(qt, k, (four *)(scores + c * W), end - c < 4 ? end - c : 4, fours, A);
                    c = end - 1;
                }
                softmax((four *)(scores + first * W), stop - first, fours);
                memset(scores, 0, first * W * sizeof *scores);
                memset(sums, 0, W * A * sizeof *sums);
                for (long c = 0; c < stop; c += size)
                    add_values(scores + c * W, store + *values++ * size * A, sums, stop - c < size ? stop - c : size, fours, A);
                memcpy(out, sums, G * A * sizeof *out);
            }
}

static uint64_t mixed(uint64_t x) {
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

/* The smallest p of the smallest set of likeliest that has at least `goal` together: what is above it has less. The bits
   of positive numbers are in the order of the numbers, so they are bisected. */
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

/* inference/sampling.py, uniforms and sample with top-p alone (null: no cut): a token and its log-probability for each row
   of logits (B, V); at temperature 0 the first of the largest. scratch: V floats */
void sample(const float *logits, const float *temperature, const float *top_p, const int64_t *seed, const int64_t *index,
            int64_t purpose, int64_t *tokens, float *logprobs, float *scratch, long B, long V) {
    const uint64_t golden = 0x9e3779b97f4a7c15u;
    for (long b = 0; b < B; b++, logits += V) {
        uint64_t x = mixed(mixed(seed[b] + (index[b] + 1) * golden) + (purpose + 1) * golden);
        float largest = -INFINITY, cool = temperature[b] > 0 ? 1 / temperature[b] : 1;
        for (long v = 0; v < V; v++) largest = logits[v] > largest ? logits[v] : largest;
        for (long v = 0; v < V; v++) scratch[v] = expf((logits[v] - largest) * cool);
        double whole = 0, total = 0, before = 0;
        for (long v = 0; v < V; v++) whole += scratch[v];
        if (top_p && top_p[b] < 1) {
            double goal = top_p[b] * whole, above = 0;
            float border = smallest_kept(scratch, 1, goal, V);
            for (long v = 0; v < V; v++) above += scratch[v] > border ? scratch[v] : 0;
            for (long v = 0; v < V; v++) /* of equals the first, as many as are needed; the likeliest in any case */
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
            for (; v < V && before <= goal; v++) /* rounding may push the goal past a stretch, never to probability 0 */
                if (scratch[v] > 0) before += scratch[v], token = v;
        }
        if (token < 0) /* greedy; or the goal fell behind the last token with a probability */
            for (token = 0; logits[token] != largest;) token++;
        tokens[b] = token;
        logprobs[b] = (logits[token] - largest) * cool - log(whole);
    }
}

/* A tile of out = factor a b + z_factor z, sums in registers: a[i * down + k * along], the others `width` wide */
#define TILE(NAME, ROWS, COLUMNS)                                                                                      \
    static void NAME(const float *a, long down, long along, const float *b, const float *z, float *out, long width,    \
                     long depth, float factor, float z_factor) {                                                       \
        lanes sum[ROWS][COLUMNS] = {{{0}}};                                                                            \
        for (long k = 0; k < depth; k++, a += along, b += width)                                                       \
            for (int i = 0; i < ROWS; i++)                                                                             \
                for (int j = 0; j < COLUMNS; j++) sum[i][j] += a[i * down] * ((const lanes *)b)[j];                    \
        for (int i = 0; i < ROWS; i++)                                                                                 \
            for (int j = 0; j < COLUMNS; j++) {                                                                        \
                lanes s = factor * sum[i][j];                                                                          \
                ((lanes *)(out + i * width))[j] = z ? s + z_factor * ((const lanes *)(z + i * width))[j] : s;          \
            }                                                                                                          \
    }
TILE(tile_6x2, 6, 2)
TILE(tile_6x1, 6, 1)
TILE(tile_1x2, 1, 2)
TILE(tile_1x1, 1, 1)

/* out (rows, width) = factor a b + z_factor z, z may be null; width whole lanes; symmetric: half of it is computed */
static void add_product(const float *a, long down, long along, const float *b, const float *z, float *out, long rows,
                        long width, long depth, float factor, float z_factor, int symmetric) {
    for (long i = 0, high; i < rows; i += high) {
        high = rows - i < 6 ? 1 : 6;
        for (long j = symmetric ? i / LANES * LANES : 0, wide; j < width; j += wide) {
            wide = width - j < 2 * LANES ? LANES : 2 * LANES;
            void (*tile)(const float *, long, long, const float *, const float *, float *, long, long, float, float) =
                high == 6 ? (wide == LANES ? tile_6x1 : tile_6x2) : (wide == LANES ? tile_1x1 : tile_1x2);
            tile(a + i * down, down, along, b + j, z ? z + i * width + j : 0, out + i * width + j, width, depth, factor,
                 z_factor);
        }
    }
    if (symmetric)
        for (long i = 1; i < rows; i++)
            for (long j = 0; j < i; j++) out[i * width + j] = out[j * width + i];
}

/* kernels/newton_schulz.py, orthogonalize: `count` matrices (rows, columns), three coefficients a step. Each is worked on
   standing, the short side n padded with zeros to whole lanes, which the iteration leaves zero: Y <- a Y + Y (b G + c G G)
   with G = Y'Y. Scratch: 2 n (n + long side), n padded. */
void newton_schulz(const float *x, float *out, float *scratch, const float *coefficients, long steps, long count,
                   long rows, long columns) {
    long n = rows < columns ? rows : columns, m = rows + columns - n, width = (n + LANES - 1) / LANES * LANES;
    long down = rows < columns ? 1 : columns, across = rows < columns ? columns : 1;
    float *gram = scratch, *polynomial = gram + width * width, *y = polynomial + width * width, *next = y + m * width;
    for (long c = 0; c < count; c++, x += rows * columns, out += rows * columns) {
        if (width > n) memset(scratch, 0, 2 * width * (width + m) * sizeof *scratch); /* NaN would stay in the padding */
        double square = 0;
        for (long i = 0; i < rows; i++) square += dot(x + i * columns, x + i * columns, columns);
        float scale = 1 / fmaxf(sqrt(square), 1e-7f);
        for (long i = 0; i < m; i++)
            for (long j = 0; j < n; j++) y[i * width + j] = x[i * down + j * across] * scale;
        for (const float *k = coefficients; k < coefficients + 3 * steps; k += 3) {
            add_product(y, 1, width, y, 0, gram, width, width, m, 1, 0, 1);
            add_product(gram, width, 1, gram, gram, polynomial, width, width, width, k[2], k[1], 1);
            add_product(y, width, 1, polynomial, y, next, m, width, width, 1, k[0], 0);
            float *old = y;
            y = next, next = old;
        }
        for (long i = 0; i < m; i++)
            for (long j = 0; j < n; j++) out[i * down + j * across] = y[i * width + j];
    }
}
