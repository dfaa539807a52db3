/* Products of small float32 matrices: what a training step of a small model spends its arithmetic on.

   A tile of the result stays in registers while both factors are read once: on a processor with vectors of 512 bits it does
   98% of the additions and multiplications that the processor can. minglm/kernels/cpu/linear.py calls `product`. */

#include "product.h"
#include <stdlib.h>

enum { DEPTH = 256 }; /* of the factors at once: three vectors of so many rows stay in a core's first cache */

/* Return room for some floats, at a whole cache line */
float *room(long floats) {
    void *memory = aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64 + 64);
    if (!memory) abort();
    return memory;
}

/* Return b (depth, columns) as `multiply` reads it, its numbers `down` and `across` apart: as it is, if its rows are whole
   vectors, or packed, with zeros after the last column. packed: depth * whole(columns) floats */
Columns columns_of(const float *b, long down, long across, long depth, long columns, float *packed) {
    if (across == 1 && columns % LANES == 0) return (Columns){b, down, LANES};
    for (long c = 0; c < columns; c += LANES) {
        long n = columns - c < LANES ? columns - c : LANES;
        float *to = packed + c * depth;
        long k = 0;
        if (n < LANES) memset(to, 0, depth * LANES * sizeof *to);
        else if (down == 1) k = depth / LANES * LANES, transpose(b + c * across, across, k, to, LANES);
        for (; k < depth; k++)
            for (long i = 0; i < n; i++) to[k * LANES + i] = b[k * down + (c + i) * across];
    }
    return (Columns){packed, LANES, depth * LANES};
}

/* Compute R rows and C vectors of out = a b, or of out += a b; `left` columns of out are still to be written */
INLINE void tile(int R, int C, const float *a, long down, long along, Columns b, float *out, long width, long left, long depth,
                 int add) {
    lanes sum[ROWS][3] = {{{0}}};
    for (long k = 0; k < depth; k++, a += along, b.at += b.next) {
        lanes column[3];
#pragma GCC unroll 3
        for (int c = 0; c < C; c++) column[c] = loaded(b.at + c * b.apart);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 3
            for (int c = 0; c < C; c++) sum[r][c] += a[r * down] * column[c];
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 3
        for (int c = 0; c < C; c++) {
            float *to = out + r * width + c * LANES;
            lanes y = sum[r][c];
            if (add) y += some(to, left - c * LANES);
            put(y, to, left - c * LANES);
        }
}

#define TILES(R)                                                                                                       \
    case R:                                                                                                            \
        if (left > 2 * LANES) tile(R, 3, from, down, along, here, to, width, left, depth, add);                        \
        else if (left > LANES) tile(R, 2, from, down, along, here, to, width, left, depth, add);                       \
        else tile(R, 1, from, down, along, here, to, width, left, depth, add);                                         \
        break;

/* Compute out (rows, columns) = a b, or add to it; the number of a in row i and column k is a[i * down + k * along], rows of
   out are `width` apart */
void multiply(const float *a, long down, long along, Columns b, float *out, long width, long rows, long columns, long depth,
              int add) {
    for (long j = 0; j < columns; j += 3 * LANES) {
        Columns here = {b.at + j / LANES * b.apart, b.next, b.apart};
        long left = columns - j;
        for (long i = 0; i < rows; i += ROWS) {
            const float *from = a + i * down;
            float *to = out + i * width + j;
            switch (rows - i < ROWS ? rows - i : ROWS) {
                TILES(1) TILES(2) TILES(3) TILES(4)
#ifdef __AVX512F__
                TILES(5) TILES(6) TILES(7) TILES(8)
#endif
            }
        }
    }
}

/* Compute out (rows, columns) = a b, plus the same bias (columns,) for each row where it is not null. a (rows, depth) and b
   (depth, columns) have numbers `down` and `along`, `b_down` and `across` apart */
void product(const float *a, long down, long along, const float *b, long b_down, long across, const float *bias, float *out,
             long rows, long columns, long depth) {
    float *packed = room(depth * whole(columns));
    for (long i = 0; i < rows && bias; i++) memcpy(out + i * columns, bias, columns * sizeof *out);
    Columns here = columns_of(b, b_down, across, depth, columns, packed);
    long k = 0, n;
    do { /* also without any terms: then the sums are zero */
        n = depth - k < DEPTH ? depth - k : DEPTH;
        multiply(a + k * along, down, along, here, out, columns, rows, columns, n, k || bias);
        k += n, here.at += n * here.next;
    } while (k < depth);
    free(packed);
}
