/* Drawing tokens, and Muon's Newton-Schulz, on a CPU in float32.

   Each function is the twin of a plain form in Python, named above it; minglm/kernels/cpu/build.py compiles, loads and calls it.
   All arrays are contiguous; letters of axes are those of minglm/__init__.py. */

#include "lanes.h"

enum { STRETCH = 64 };

static float dot(const float *a, const float *b, long n) {
    float sum = 0;
    for (long i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
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
   of logits (B, V); at temperature 0 the first of the largest. scratch: V floats in whole vectors */
void sample(const float *logits, const float *temperature, const float *top_p, const int64_t *seed, const int64_t *index,
            int64_t purpose, int64_t *tokens, float *logprobs, float *scratch, long B, long V) {
    const uint64_t golden = 0x9e3779b97f4a7c15u;
    for (long b = 0; b < B; b++, logits += V) {
        uint64_t x = mixed(mixed(seed[b] + (index[b] + 1) * golden) + (purpose + 1) * golden);
        float largest = -INFINITY, cool = temperature[b] > 0 ? 1 / temperature[b] : 1;
        for (long v = 0; v < V; v++) largest = logits[v] > largest ? logits[v] : largest;
        for (long v = 0; v < V; v++) scratch[v] = (logits[v] - largest) * cool;
        for (long v = 0; v < V; v += LANES) *(lanes *)(scratch + v) = exponential(*(lanes *)(scratch + v));
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

/* R rows and C vectors of out = factor a b + z_factor z, sums in registers: a[i * down + k * along], the others `width` wide */
INLINE void tile(int R, int C, const float *a, long down, long along, const float *b, const float *z, float *out, long width,
                 long depth, float factor, float z_factor) {
    lanes sum[6][2] = {{{0}}};
    for (long k = 0; k < depth; k++, a += along, b += width)
        for (int i = 0; i < R; i++)
            for (int j = 0; j < C; j++) sum[i][j] += a[i * down] * ((const lanes *)b)[j];
    for (int i = 0; i < R; i++)
        for (int j = 0; j < C; j++) {
            lanes s = factor * sum[i][j];
            if (z) s += z_factor * ((const lanes *)(z + i * width))[j];
            ((lanes *)(out + i * width))[j] = s;
        }
}

/* out (rows, width) = factor a b + z_factor z, z may be null; width whole lanes; symmetric: half of it is computed */
static void add_product(const float *a, long down, long along, const float *b, const float *z, float *out, long rows,
                        long width, long depth, float factor, float z_factor, int symmetric) {
    for (long i = 0, high; i < rows; i += high) {
        high = rows - i < 6 ? 1 : 6;
        for (long j = symmetric ? i / LANES * LANES : 0, wide; j < width; j += wide) {
            wide = width - j < 2 * LANES ? LANES : 2 * LANES;
            const float *from = a + i * down, *to = b + j, *plus = z ? z + i * width + j : 0;
            float *here = out + i * width + j;
            if (high == 6 && wide == LANES) tile(6, 1, from, down, along, to, plus, here, width, depth, factor, z_factor);
            else if (high == 6) tile(6, 2, from, down, along, to, plus, here, width, depth, factor, z_factor);
            else if (wide == LANES) tile(1, 1, from, down, along, to, plus, here, width, depth, factor, z_factor);
            else tile(1, 2, from, down, along, to, plus, here, width, depth, factor, z_factor);
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
