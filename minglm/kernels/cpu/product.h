/* Products of matrices with the sums in registers, for `product.c` and whoever computes more than a product. */

#ifndef MINGLM_PRODUCT
#define MINGLM_PRODUCT

#include "lanes.h"

/* The right factor of a product, (depth, columns): vector c of row k begins at at + k * next + c * apart */
typedef struct {
    const float *at;
    long next, apart;
} Columns;

float *room(long floats);

Columns columns_of(const float *b, long down, long across, long depth, long columns, float *packed);

void multiply(const float *a, long down, long along, Columns b, float *out, long width, long rows, long columns, long depth,
              int add);

#endif
