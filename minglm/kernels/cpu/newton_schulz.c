/* Muon's Newton-Schulz on a CPU in float32.

   The twin of minglm/kernels/newton_schulz/eager.py; minglm/kernels/cpu/newton_schulz.py calls it. All arrays are contiguous. */

#include "lanes.h"

static float dot(const float *a, const float *b, long n) {
    float sum = 0;
    for (long i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

/* Compute R rows and C vectors of out = factor a b + z_factor z, with the sums in registers. The number of a in row i and
   column k is a[i * down + k * along]; rows of the others are `width` apart */
INLINE void tile(int R, int C, const float *a, long down, long along, const float *b, const float *z, float *out, long width,
                 long depth, float factor, float z_factor) {
    lanes sum[6][2] = {{{0}}};
    for (long k = 0; k < depth; k++, a += along, b += width) {
        lanes column[2];
        for (int j = 0; j < C; j++) column[j] = loaded(b + j * LANES);
        for (int i = 0; i < R; i++)
            for (int j = 0; j < C; j++) sum[i][j] += a[i * down] * column[j];
    }
    for (int i = 0; i < R; i++)
        for (int j = 0; j < C; j++) {
            lanes s = factor * sum[i][j];
            if (z) s += z_factor * ((const lanes *)(z + i * width))[j];
            ((lanes *)(out + i * width))[j] = s;
        }
}

/* Compute out (rows, width) = factor a b + z_factor z; z may be null, and width is whole lanes. symmetric: only one half is
   computed, and copied to the other */
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

/* Orthogonalize `count` matrices (rows, columns) with three coefficients a step. Each is worked on with its short side n as
   columns, padded with zeros to whole lanes, which the iteration leaves zero: Y <- a Y + Y (b G + c G G) with G = Y'Y.
   scratch: 2 n (n + long side) floats, n padded */
void newton_schulz(const float *x, float *out, float *scratch, const float *coefficients, long steps, long count,
                   long rows, long columns) {
    long n = rows < columns ? rows : columns, m = rows + columns - n, width = whole(n);
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
