/* RMSNorm after the addition to the residual stream, and QK-norm with rotation, each with its backward pass.

   Twins of minglm/kernels/norm/fused.py and minglm/kernels/qk_norm_rope/fused.py, where the equations are;
   minglm/kernels/cpu/norm.py calls them. Each row is read and written once. All arrays are contiguous. */

#include "lanes.h"

/* r = x + change, or x where change is null (r is then not written); out its norm; scale (rows,) is kept */
void norm_forward(const float *x, const float *change, const float *weight, float *r, float *out, float *scale, long rows,
                  long D, float eps) {
    for (long t = 0; t < rows; t++, x += D, out += D) {
        float square = 0;
        if (change) {
            for (long d = 0; d < D; d++) r[d] = x[d] + change[d];
            for (long d = 0; d < D; d++) square += r[d] * r[d];
            change += D, r += D;
        } else
            for (long d = 0; d < D; d++) square += x[d] * x[d];
        const float *from = change ? r - D : x;
        float s = scale[t] = 1 / sqrtf(square / D + eps);
        for (long d = 0; d < D; d++) out[d] = from[d] * s * weight[d];
    }
}

/* dx = dr + the gradient through the norm of r; dr may be null. dweight (D,) is added to */
void norm_backward(const float *dout, const float *dr, const float *r, const float *weight, const float *scale, float *dx,
                   float *dweight, long rows, long D) {
    for (long t = 0; t < rows; t++, dout += D, r += D, dx += D) {
        float s = scale[t], mean = 0;
        for (long d = 0; d < D; d++) mean += dout[d] * weight[d] * r[d];
        mean *= s * s * s / D;
        for (long d = 0; d < D; d++) dweight[d] += dout[d] * r[d] * s;
        if (dr) {
            for (long d = 0; d < D; d++) dx[d] = dr[d] + dout[d] * weight[d] * s - r[d] * mean;
            dr += D;
        } else
            for (long d = 0; d < D; d++) dx[d] = dout[d] * weight[d] * s - r[d] * mean;
    }
}

/* out = rotated norm of x (tokens, heads, A); cosine and sine (period, half), for token t those of t % period */
void rotate_forward(const float *x, const float *weight, const float *cosine, const float *sine, float *out, float *scale,
                    long tokens, long period, long heads, long A, long half, float eps) {
    for (long t = 0; t < tokens; t++) {
        const float *c = cosine + t % period * half, *s = sine + t % period * half;
        for (long n = 0; n < heads; n++, x += A, out += A, scale++) {
            float square = 0, m;
            for (long i = 0; i < A; i++) square += x[i] * x[i];
            m = *scale = 1 / sqrtf(square / A + eps);
            for (long i = 0; i < half; i++) {
                float a = x[i] * m * weight[i], b = x[i + half] * m * weight[i + half];
                out[i] = a * c[i] - b * s[i];
                out[i + half] = b * c[i] + a * s[i];
            }
            for (long i = 2 * half; i < A; i++) out[i] = x[i] * m * weight[i];
        }
    }
}

/* dx from the gradient dout of the rotated norm; dweight (A,) is added to */
void rotate_backward(const float *dout, const float *x, const float *weight, const float *cosine, const float *sine,
                     const float *scale, float *dx, float *dweight, long tokens, long period, long heads, long A, long half) {
    for (long t = 0; t < tokens; t++) {
        const float *c = cosine + t % period * half, *s = sine + t % period * half;
        for (long n = 0; n < heads; n++, x += A, dout += A, dx += A, scale++) {
            float back[A], m = *scale;
            for (long i = 0; i < half; i++) {
                back[i] = dout[i] * c[i] + dout[i + half] * s[i];
                back[i + half] = dout[i + half] * c[i] - dout[i] * s[i];
            }
            for (long i = 2 * half; i < A; i++) back[i] = dout[i];
            float mean = 0;
            for (long i = 0; i < A; i++) mean += back[i] * weight[i] * x[i];
            mean *= m * m * m / A;
            for (long i = 0; i < A; i++) dweight[i] += back[i] * x[i] * m;
            for (long i = 0; i < A; i++) dx[i] = back[i] * weight[i] * m - x[i] * mean;
        }
    }
}
