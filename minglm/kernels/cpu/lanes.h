/* Vectors of as many float32 numbers as the processor takes at once, with the operations that C has no operator for. */

#ifndef MINGLM_LANES
#define MINGLM_LANES

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __AVX512F__
#include <immintrin.h>
enum { LANES = 16, ROWS = 8 }; /* rows of a tile of a product: with three vectors for each they fill the registers */
#else
enum { LANES = 8, ROWS = 4 };
#endif

#define INLINE static inline __attribute__((always_inline))

typedef float lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int ints __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

INLINE long whole(long n) { return (n + LANES - 1) / LANES * LANES; }

INLINE lanes all(float x) { return x - (lanes){0}; }

/* The next numbers, in a register from here on: the compiler would have each row of a tile read them again, and with vectors of
   256 bits a processor then waits for its loads a third of the time */
INLINE lanes loaded(const float *x) {
    lanes y = *(const lanes *)x;
#ifdef __AVX__
    __asm__("" : "+v"(y));
#endif
    return y;
}

INLINE ints lane(void) { /* 0, 1, 2, ... */
    ints number;
    for (int i = 0; i < LANES; i++) number[i] = i;
    return number;
}

INLINE lanes either(ints condition, lanes yes, lanes no) { return (lanes)((condition & (ints)yes) | (~condition & (ints)no)); }

INLINE lanes larger(lanes a, lanes b) {
#ifdef __AVX512F__
    return (lanes)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return either(a > b, a, b);
#endif
}

INLINE lanes some(const float *x, long n) { /* the next n numbers, where n is less than LANES, and zeros */
    if (n >= LANES) return *(const lanes *)x;
#ifdef __AVX512F__
    return (lanes)_mm512_maskz_loadu_ps((1 << n) - 1, x);
#else
    lanes y = {0};
    memcpy(&y, x, n * sizeof *x);
    return y;
#endif
}

INLINE void put(lanes y, float *x, long n) {
    if (n >= LANES) *(lanes *)x = y;
#ifdef __AVX512F__
    else _mm512_mask_storeu_ps(x, (1 << n) - 1, (__m512)y);
#else
    else memcpy(x, &y, n * sizeof *x);
#endif
}

INLINE lanes apart(lanes x, int d) { /* x[i ^ d] */
#ifdef __clang__
    lanes y;
    for (int i = 0; i < LANES; i++) y[i] = x[i ^ d];
    return y;
#else
    return __builtin_shuffle(x, lane() ^ d);
#endif
}

/* -1 where a number is infinite or none. The compiler takes every number to be finite, so the exponents are read */
INLINE ints unsound(lanes x) { return ((ints)x & 0x7f800000) == 0x7f800000; }

INLINE int some_true(ints x) {
    int found = 0;
    for (int i = 0; i < LANES; i++) found |= x[i];
    return found;
}

INLINE float not_a_number(void) {
    const int bits = 0x7fc00000;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

INLINE float sum_of(lanes x) {
#pragma GCC unroll 4
    for (int d = LANES / 2; d; d /= 2) x += apart(x, d);
    return x[0];
}

INLINE float largest_of(lanes x) {
#pragma GCC unroll 4
    for (int d = LANES / 2; d; d /= 2) x = larger(x, apart(x, d));
    return x[0];
}

/* Transpose `columns` columns of as many numbers as LANES rows: from and to are rows of these widths, in whole vectors */
INLINE void transpose(const float *from, long width, long columns, float *to, long to_width) {
    for (long c = 0; c < columns; c += LANES) {
        lanes x[LANES];
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) x[i] = *(const lanes *)(from + i * width + c);
#pragma GCC unroll 4
        for (int d = 1; d < LANES; d *= 2) /* numbers change places with those whose row and column differ in this bit */
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++)
                if (!(i & d)) {
                    ints odd = (lane() & d) != 0;
                    lanes above = x[i], below = x[i + d];
                    x[i] = either(odd, apart(below, d), above);
                    x[i + d] = either(odd, below, apart(above, d));
                }
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) *(lanes *)(to + (c + i) * to_width) = x[i];
    }
}

/* e^x = 2^n 2^f with f within half of zero: 2^f is its series in f ln 2, and 2^n has the exponent n + 127. Relative error
   below 3e-7 for small x, and |x| times 6e-8 for others, because x / ln 2 is rounded; below 2^-126 it is 0, and it ends at 2^126. */
INLINE lanes exponential(lanes x) {
    lanes y = larger(-larger(x * -1.44269504f, all(-126)), all(-127));
    ints n = __builtin_convertvector(y + 127.5f, ints);
    lanes f = y - __builtin_convertvector(n - 127, lanes), power = f * 1.5403530e-4f + 1.3333558e-3f;
    power = power * f + 9.6181291e-3f;
    power = power * f + 5.5504109e-2f;
    power = power * f + 2.4022651e-1f;
    power = power * f + 6.9314718e-1f;
    power = power * f + 1;
    return power * (lanes)(n << 23);
}

#endif
