/* Sums over the rows of each column of logits [B, K], float32 or bfloat16, for Sinkhorn-Knopp.

   Rows are `stride` elements apart; those whose mask is set are skipped. `scale` = log2(e) /
   temperature, so that exp(z / temperature) = 2^(scale z). Logits are read once. Each group of
   `group` rows has a partial result, and these are merged in their order: the number of threads
   changes no bit. */

#include "vectors.h"

#define STRIP 8 /* rows that are read side by side: their sums stay in registers */

typedef struct {
    const void *logits;
    const uint8_t *mask; /* or NULL */
    int64_t stride, B, K, group, size;
} Rows;

/* The next rows, `limit` at most, that take part in a group: their positions and number. */
static int64_t next_rows(const Rows *rows, int64_t *row, int64_t end, int64_t limit, int64_t *at) {
    int64_t found = 0;
    for (; *row < end && found < limit; ++*row)
        if (!rows->mask || !rows->mask[*row]) at[found++] = *row * rows->stride;
    return found;
}

static inline int64_t groups_of(const Rows *rows) {
    return (rows->B + rows->group - 1) / rows->group;
}

/* out [K] = the sum of the groups' partial sums [groups, padded(K)]. */
static void sum_groups(
    float *out, const float *partial, int64_t groups, int64_t K, int64_t threads) {
    int64_t width = padded(K);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t k = 0; k < width; k += LANES) {
        vec sum = {0};
        for (int64_t g = 0; g < groups; g++) sum += load(partial + g * width + k);
        memcpy(out + k, &sum, 4 * (K - k < LANES ? K - k : LANES));
    }
}

/* ------------------------------------------------- sum_b exp(s_bk - max_b s_bk), and the maxima */

static inline __attribute__((always_inline)) void logsumexp_strip(
    int n, const Rows *rows, const int64_t *at, float scale, float *largest, float *sums,
    int64_t size) {
    for (int64_t k = 0; k < rows->K; k += LANES) {
        vec x[STRIP], before = load(largest + k), top = before;
        for (int i = 0; i < n; i++) {
            x[i] = load_some_from(rows->logits, at[i] + k, rows->K - k, size);
            top = larger(x[i], top);
        }
        vec shift = choose(top == -__builtin_inff(), (vec){0}, top);
        vec sum = load(sums + k) * two_to(scale * (before - shift));
        for (int i = 0; i < n; i++) sum += two_to(scale * (x[i] - shift));
        store(largest + k, top);
        store(sums + k, sum);
    }
}

/* largest and sums [K], from partial [2, groups, padded(K)]: of logits, not yet divided by the
   temperature, and -inf and 0 for columns without a finite one. */
int sinkhorn_logsumexp(
    float *largest, float *sums, float *partial, const void *logits, const void *mask,
    int64_t stride, float scale, int64_t B, int64_t K, int64_t group, int64_t size,
    int64_t threads) {
    Rows rows = {logits, mask, stride, B, K, group, size};
    int64_t width = padded(K), groups = groups_of(&rows);
    float *other = partial + groups * width;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t g = 0; g < groups; g++) {
        float *m = partial + g * width, *s = other + g * width;
        for (int64_t k = 0; k < width; k++) m[k] = -__builtin_inff(), s[k] = 0;
        int64_t row = g * group, end = row + group < B ? row + group : B, at[STRIP], n;
        while ((n = next_rows(&rows, &row, end, STRIP, at))) {
            if (n == STRIP && size == 4)
                logsumexp_strip(STRIP, &rows, at, scale, m, s, 4);
            else if (n == STRIP)
                logsumexp_strip(STRIP, &rows, at, scale, m, s, 2);
            else
                for (int64_t i = 0; i < n; i++)
                    logsumexp_strip(1, &rows, at + i, scale, m, s, size);
        }
    }
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t k = 0; k < width; k += LANES) {
        vec top = (vec){0} - __builtin_inff(), sum = {0};
        for (int64_t g = 0; g < groups; g++) top = larger(load(partial + g * width + k), top);
        vec shift = choose(top == -__builtin_inff(), (vec){0}, top);
        for (int64_t g = 0; g < groups; g++)
            sum += load(other + g * width + k) *
                   two_to(scale * (load(partial + g * width + k) - shift));
        int64_t bytes = 4 * (K - k < LANES ? K - k : LANES);
        memcpy(largest + k, &top, bytes);
        memcpy(sums + k, &sum, bytes);
    }
    return 0;
}

/* ----------------------------------------------------------------------- sum_b exp(s_bk + bias_k) */

static inline __attribute__((always_inline)) void exp_sum_strip(
    int n, const Rows *rows, const int64_t *at, float scale, const float *bias, float *sums,
    int64_t size) {
    for (int64_t k = 0; k < rows->K; k += LANES) {
        vec u = load(bias + k), sum = load(sums + k);
        for (int i = 0; i < n; i++)
            sum += two_to(scale * load_some_from(rows->logits, at[i] + k, rows->K - k, size) + u);
        store(sums + k, sum);
    }
}

/* out [K], from partial [groups + 1, padded(K)]. */
int sinkhorn_exp_sum(
    float *out, float *partial, const void *logits, const void *mask, const float *bias,
    int64_t stride, float scale, int64_t B, int64_t K, int64_t group, int64_t size,
    int64_t threads) {
    Rows rows = {logits, mask, stride, B, K, group, size};
    int64_t width = padded(K), groups = groups_of(&rows);
    float *scaled = partial + groups * width;
    scale_bias(scaled, bias, K);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t g = 0; g < groups; g++) {
        float *s = partial + g * width;
        memset(s, 0, 4 * width);
        int64_t row = g * group, end = row + group < B ? row + group : B, at[STRIP], n;
        while ((n = next_rows(&rows, &row, end, STRIP, at))) {
            if (n == STRIP && size == 4)
                exp_sum_strip(STRIP, &rows, at, scale, scaled, s, 4);
            else if (n == STRIP)
                exp_sum_strip(STRIP, &rows, at, scale, scaled, s, 2);
            else
                for (int64_t i = 0; i < n; i++)
                    exp_sum_strip(1, &rows, at + i, scale, scaled, s, size);
        }
    }
    sum_groups(out, partial, groups, K, threads);
    return 0;
}

/* -------------------------------------------------------------- sum_b softmax_k(s_b + bias)[k]

   Of a row: e_k = 2^(scale z_k + log2(e) bias_k), r = sum_k e_k, and 1 / r times e is added to the
   columns' sums while the next row's e are computed in their place. A row needs its maximum only
   where r is out of the middle of float32's range, as it hardly ever is (PyTorch's body says why);
   then that is subtracted from its exponents. */

#define TOGETHER 2 /* rows */

/* e [n, width] of the rows, their sums r, and whether an exponent was too large, or NaN;
   sums += sum_i weights[i] e[i] of the e before. */
static inline __attribute__((always_inline)) void mass_strip(
    int n, const Rows *rows, const int64_t *at, float scale, const float *bias, float *e,
    float *weights, float *sums, int64_t size) {
    int64_t width = padded(rows->K);
    vec total[TOGETHER] = {0};
    ivec wild[TOGETHER] = {0};
    for (int64_t k = 0; k < width; k += LANES) {
        vec u = load(bias + k), sum = load(sums + k);
        for (int i = 0; i < n; i++) {
            sum += weights[i] * load(e + i * width + k);
            vec x = scale * load_some_from(rows->logits, at[i] + k, rows->K - k, size) + u;
            wild[i] |= ~(x <= 126.0f);
            vec power = two_to(x);
            total[i] += power;
            store(e + i * width + k, power);
        }
        store(sums + k, sum);
    }
    for (int i = 0; i < n; i++) {
        float r = any(wild[i]) ? __builtin_inff() : sum_of((float *)&total[i]);
        weights[i] = 1 / r;
    }
}

/* e of one row with its maximum subtracted; returns 1 / r. */
static float mass_of_wild_row(
    const Rows *rows, int64_t at, float scale, const float *bias, float *e, int64_t size) {
    vec top = (vec){0} - __builtin_inff(), total = {0};
    for (int64_t k = 0; k < rows->K; k += LANES) {
        vec x = scale * load_some_from(rows->logits, at + k, rows->K - k, size) + load(bias + k);
        store(e + k, x);
        top = larger(x, top);
    }
    float largest = largest_of((float *)&top);
    for (int64_t k = 0; k < rows->K; k += LANES) {
        vec power = two_to(load(e + k) - largest);
        store(e + k, power);
        total += power;
    }
    return 1 / sum_of((float *)&total);
}

/* out [K], from partial [groups + 1, padded(K)]. */
int sinkhorn_mass(
    float *out, float *partial, const void *logits, const void *mask, const float *bias,
    int64_t stride, float scale, int64_t B, int64_t K, int64_t group, int64_t size,
    int64_t threads) {
    Rows rows = {logits, mask, stride, B, K, group, size};
    int64_t width = padded(K), groups = groups_of(&rows);
    float *scaled = partial + groups * width;
    int failed = 0;
    scale_bias(scaled, bias, K);
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        float *e = aligned_alloc(64, 4 * TOGETHER * width);
        failed = e == NULL;
#pragma omp for schedule(static)
        for (int64_t g = 0; g < groups; g++) {
            if (failed) continue;
            float *s = partial + g * width, weights[TOGETHER] = {0};
            memset(s, 0, 4 * width);
            memset(e, 0, 4 * TOGETHER * width);
            int64_t row = g * group, end = row + group < B ? row + group : B, at[TOGETHER], n;
            while ((n = next_rows(&rows, &row, end, TOGETHER, at))) {
                if (n == TOGETHER && size == 4)
                    mass_strip(TOGETHER, &rows, at, scale, scaled, e, weights, s, 4);
                else if (n == TOGETHER)
                    mass_strip(TOGETHER, &rows, at, scale, scaled, e, weights, s, 2);
                else
                    for (int64_t i = 0; i < n; i++)
                        mass_strip(1, &rows, at + i, scale, scaled, e + i * width, weights + i, s, size);
                for (int64_t i = 0; i < n; i++)
                    if (!(weights[i] > 1e-14f && weights[i] < 1e14f))
                        weights[i] = mass_of_wild_row(&rows, at[i], scale, scaled, e + i * width, size);
            }
            for (int i = 0; i < TOGETHER; i++)
                for (int64_t k = 0; k < width; k++) s[k] += weights[i] * e[i * width + k];
        }
        free(e);
    }
    sum_groups(out, partial, groups, K, threads);
    return failed;
}
