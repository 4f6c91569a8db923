/* A residual branch of a Transformer block: y = x + keep gamma branch, and its gradient. x, y and
   branch are [rows, D]; gamma [D] (LayerScale) and keep [rows] (stochastic depth) are float32, or
   NULL for ones. x and y have one type, branch may have another: float32 or bfloat16. */

#include "vectors.h"

#define CHUNK 512 /* features at a time */

int residual_forward(
    void *y, const void *x, const void *branch, const float *gamma, const float *keep, int64_t rows,
    int64_t D, int64_t size, int64_t branch_size, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; row++) {
        float factor = keep ? keep[row] : 1;
        for (int64_t start = 0; start < D; start += CHUNK) {
            int64_t n = D - start < CHUNK ? D - start : CHUNK, at = row * D + start;
            float sum[CHUNK], added[CHUNK];
            read_row(sum, x, at, n, size);
            read_row(added, branch, at, n, branch_size);
            if (gamma)
                for (int64_t i = 0; i < n; i++) sum[i] += factor * gamma[start + i] * added[i];
            else
                for (int64_t i = 0; i < n; i++) sum[i] += factor * added[i];
            write_row(y, at, sum, n, size);
        }
    }
    return 0;
}

/* dbranch = keep gamma dy and dgamma = sum over rows of keep dy branch: one partial sum [D] for each
   group of `group` rows, so that the result does not depend on the number of threads. */
int residual_backward(
    void *dbranch, float *partial, const void *dy, const void *branch, const float *gamma,
    const float *keep, int64_t rows, int64_t group, int64_t D, int64_t size, int64_t branch_size,
    int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t first = 0; first < rows; first += group) {
        int64_t end = first + group < rows ? first + group : rows;
        float *sum = partial + first / group * D;
        memset(sum, 0, 4 * D);
        for (int64_t row = first; row < end; row++) {
            float factor = keep ? keep[row] : 1;
            for (int64_t start = 0; start < D; start += CHUNK) {
                int64_t n = D - start < CHUNK ? D - start : CHUNK, at = row * D + start;
                float g[CHUNK], b[CHUNK];
                read_row(g, dy, at, n, size);
                read_row(b, branch, at, n, branch_size);
                for (int64_t i = 0; i < n; i++) g[i] *= factor;
                for (int64_t i = 0; i < n; i++) sum[start + i] += g[i] * b[i];
                if (gamma)
                    for (int64_t i = 0; i < n; i++) g[i] *= gamma[start + i];
                write_row(dbranch, at, g, n, branch_size);
            }
        }
    }
    return 0;
}
