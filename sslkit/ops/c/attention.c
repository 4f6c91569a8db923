/* Softmax attention inside crops of one length, forward and backward, in float32.

   qkv is [T, 3, h, d] and out [T, h, d], float32 or bfloat16, of T = crops * n tokens. A thread
   takes one crop and head at a time, whose matrices fit in its caches:

       S = scale q k^T     P = softmax(S)     out = P v
       dv = P^T dout       dP = dout v^T      dS = scale P * (dP - sum_j P dP)
       dq = dS k           dk = dS^T q

   The backward computes P again, from qkv. */

#include "vectors.h"

#define ROWS 6 /* of a block of a product: with 3 vectors of columns, 18 sums stay in registers */

/* c[m, :] = sum_k a[m * row + k * column] b[k, :] for m < rows, of `vectors` vectors of columns.
   Rows of b and c are `width` floats apart. */
static inline __attribute__((always_inline)) void block(
    int rows, int vectors, int64_t K, const float *a, int64_t row, int64_t column, const float *b,
    float *c, int64_t width) {
    vec sums[ROWS][3] = {0};
    for (int64_t k = 0; k < K; k++)
        for (int m = 0; m < rows; m++)
            for (int v = 0; v < vectors; v++)
                sums[m][v] += a[m * row + k * column] * load(b + k * width + v * LANES);
    for (int m = 0; m < rows; m++)
        for (int v = 0; v < vectors; v++) store(c + m * width + v * LANES, sums[m][v]);
}

static void columns_of_product(
    int vectors, int64_t M, int64_t K, const float *a, int64_t row, int64_t column, const float *b,
    float *c, int64_t width) {
    if (M < ROWS) {
        for (int64_t m = 0; m < M; m++)
            block(1, vectors, K, a + m * row, row, column, b, c + m * width, width);
        return;
    }
    for (int64_t m = 0; m < M; m += ROWS) {
        int64_t start = m + ROWS <= M ? m : M - ROWS; /* the last block may repeat some rows */
        block(ROWS, vectors, K, a + start * row, row, column, b, c + start * width, width);
    }
}

/* c [M, width] = a [M, K] b [K, width]; element (m, k) of a lies at m * row + k * column. */
static void product(
    int64_t M, int64_t K, const float *a, int64_t row, int64_t column, const float *b, float *c,
    int64_t width) {
    int64_t n = 0;
    for (; n + 3 * LANES <= width; n += 3 * LANES)
        columns_of_product(3, M, K, a, row, column, b + n, c + n, width);
    if (width - n == 2 * LANES) columns_of_product(2, M, K, a, row, column, b + n, c + n, width);
    if (width - n == LANES) columns_of_product(1, M, K, a, row, column, b + n, c + n, width);
}

/* Softmax of the first n of `width` numbers of n rows; the rest becomes 0. The loops go over whole
   vectors, as what is left over would take longer than the vectors. */
static void softmax(float *S, int64_t n, int64_t width) {
    for (int64_t i = 0; i < n; i++) {
        float *s = S + i * width, largest[LANES], total[LANES] = {0};
        for (int64_t j = n; j < width; j++) s[j] = -__builtin_inff();
        memcpy(largest, s, sizeof largest);
        for (int64_t j = LANES; j < width; j += LANES)
            for (int l = 0; l < LANES; l++)
                largest[l] = s[j + l] > largest[l] ? s[j + l] : largest[l];
        float top = largest_of(largest);
        for (int64_t j = 0; j < width; j += LANES)
            for (int l = 0; l < LANES; l++) total[l] += s[j + l] = exponential(s[j + l] - top);
        float inverse = 1 / sum_of(total);
        for (int64_t j = 0; j < width; j++) s[j] *= inverse;
    }
}

/* to [n, width] = d numbers of each of n rows, `stride` apart in a tensor, and zeros. */
static void read(
    float *to, int64_t width, const void *from, int64_t at, int64_t stride, int64_t n, int64_t d,
    int64_t size) {
    for (int64_t i = 0; i < n; i++) {
        read_row(to + i * width, from, at + i * stride, d, size);
        for (int64_t j = d; j < width; j++) to[i * width + j] = 0;
    }
}

static void write(
    void *to, int64_t at, int64_t stride, const float *from, int64_t width, int64_t n, int64_t d,
    int64_t size) {
    for (int64_t i = 0; i < n; i++) write_row(to, at + i * stride, from + i * width, d, size);
}

/* to [d, to_width] = scale times from [n, width] transposed, and zeros. */
static void transpose(
    float *to, int64_t to_width, const float *from, int64_t width, int64_t n, int64_t d,
    float scale) {
    for (int64_t j = 0; j < d; j++) {
        for (int64_t i = 0; i < n; i++) to[j * to_width + i] = scale * from[i * width + j];
        for (int64_t i = n; i < to_width; i++) to[j * to_width + i] = 0;
    }
}

/* Returns 0, or 1 if there is no memory. So do all kernels. */
int attention_forward(
    void *out, const void *qkv, int64_t crops, int64_t n, int64_t h, int64_t d, float scale,
    int64_t size, int64_t threads) {
    int64_t w = padded(d), wn = padded(n), stride = 3 * h * d;
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        float *q = aligned_alloc(64, 4 * (4 * n * w + d * wn + n * wn));
        float *k = q + n * w, *v = k + n * w, *o = v + n * w, *kT = o + n * w, *S = kT + d * wn;
        failed = q == NULL;
#pragma omp for schedule(static)
        for (int64_t pair = 0; pair < crops * h; pair++) {
            if (failed) continue;
            int64_t crop = pair / h, head = pair % h, at = crop * n * stride + head * d;
            read(q, w, qkv, at, stride, n, d, size);
            read(k, w, qkv, at + h * d, stride, n, d, size);
            read(v, w, qkv, at + 2 * h * d, stride, n, d, size);
            transpose(kT, wn, k, w, n, d, scale);
            product(n, d, q, w, 1, kT, S, wn);
            softmax(S, n, wn);
            product(n, n, S, wn, 1, v, o, w);
            write(out, crop * n * h * d + head * d, h * d, o, w, n, d, size);
        }
        free(q);
    }
    return failed;
}

int attention_backward(
    void *dqkv, const void *dout, const void *qkv, int64_t crops, int64_t n, int64_t h, int64_t d,
    float scale, int64_t size, int64_t threads) {
    int64_t w = padded(d), wn = padded(n), stride = 3 * h * d;
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        float *q = aligned_alloc(64, 4 * (5 * n * w + 2 * d * wn + 2 * n * wn));
        float *k = q + n * w, *v = k + n * w, *g = v + n * w, *result = g + n * w;
        float *kT = result + n * w, *vT = kT + d * wn, *P = vT + d * wn, *dS = P + n * wn;
        failed = q == NULL;
#pragma omp for schedule(static)
        for (int64_t pair = 0; pair < crops * h; pair++) {
            if (failed) continue;
            int64_t crop = pair / h, head = pair % h, at = crop * n * stride + head * d;
            read(q, w, qkv, at, stride, n, d, size);
            read(k, w, qkv, at + h * d, stride, n, d, size);
            read(v, w, qkv, at + 2 * h * d, stride, n, d, size);
            read(g, w, dout, crop * n * h * d + head * d, h * d, n, d, size);
            transpose(kT, wn, k, w, n, d, scale);
            transpose(vT, wn, v, w, n, d, 1);
            product(n, d, q, w, 1, kT, P, wn);
            softmax(P, n, wn);
            product(n, n, P, 1, wn, g, result, w);
            write(dqkv, at + 2 * h * d, stride, result, w, n, d, size);
            product(n, d, g, w, 1, vT, dS, wn); /* dP */
            for (int64_t i = 0; i < n; i++) {
                float *p = P + i * wn, *s = dS + i * wn, products[LANES] = {0};
                for (int64_t j = 0; j < wn; j += LANES)
                    for (int l = 0; l < LANES; l++) products[l] += p[j + l] * s[j + l];
                float mean = sum_of(products);
                for (int64_t j = 0; j < wn; j++) s[j] = scale * p[j] * (s[j] - mean);
            }
            product(n, n, dS, wn, 1, k, result, w);
            write(dqkv, at, stride, result, w, n, d, size);
            product(n, n, dS, 1, wn, q, result, w);
            write(dqkv, at + h * d, stride, result, w, n, d, size);
        }
        free(q);
    }
    return failed;
}
