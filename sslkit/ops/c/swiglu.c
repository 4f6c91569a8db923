/* The gate of SwiGLU and its gradient: x [rows, 2 * hidden] holds a and b side by side,
   y = a sigmoid(a) b. Float32 or bfloat16. */

#include "vectors.h"

#define CHUNK 256

static inline float sigmoid(float a) { return 1 / (1 + exponential(-a)); }

int swiglu_forward(
    void *y, const void *x, int64_t rows, int64_t hidden, int64_t size, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; row++) {
        for (int64_t start = 0; start < hidden; start += CHUNK) {
            int64_t n = hidden - start < CHUNK ? hidden - start : CHUNK;
            int64_t at = row * 2 * hidden + start;
            float a[CHUNK], b[CHUNK];
            read_row(a, x, at, n, size);
            read_row(b, x, at + hidden, n, size);
            for (int64_t i = 0; i < n; i++) a[i] = a[i] * sigmoid(a[i]) * b[i];
            write_row(y, row * hidden + start, a, n, size);
        }
    }
    return 0;
}

int swiglu_backward(
    void *dx, const void *dy, const void *x, int64_t rows, int64_t hidden, int64_t size,
    int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; row++) {
        for (int64_t start = 0; start < hidden; start += CHUNK) {
            int64_t n = hidden - start < CHUNK ? hidden - start : CHUNK;
            int64_t at = row * 2 * hidden + start;
            float a[CHUNK], b[CHUNK], g[CHUNK];
            read_row(a, x, at, n, size);
            read_row(b, x, at + hidden, n, size);
            read_row(g, dy, row * hidden + start, n, size);
            for (int64_t i = 0; i < n; i++) {
                float s = sigmoid(a[i]), silu = a[i] * s;
                a[i] = g[i] * b[i] * (s + silu * (1 - s));
                b[i] = g[i] * silu;
            }
            write_row(dx, at, a, n, size);
            write_row(dx, at + hidden, b, n, size);
        }
    }
    return 0;
}
