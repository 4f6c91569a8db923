/* Cross-entropy of student rows with soft targets, and its gradient; `sslkit/ops/cross_entropy.py`
   has the derivation and the names.

   The columns are cut into parts of TILE, which stay in a core's first cache while all is computed
   that follows from them. A shift is 0 where the sum of the exponentials says that it may be, else
   the maximum of the part. Exponents of students are to base 2, x = scale (z - shift) with scale =
   log2(e) / temperature; those of targets, where the bias comes before the shift, are to base e. */

#include <math.h>

#include "vectors.h"

#define TILE 1024 /* as in cross_entropy_c.py */
#define LN2 0.693147181f

typedef struct {
    const void *student, *target;
    const float *bias;          /* [padded(K)], or NULL: targets are probabilities */
    const int64_t *target_rows; /* [M, T], or NULL: row m is paired with target m */
    int64_t student_stride, target_stride, student_size, target_size;
    float student_scale, target_scale;
    int64_t M, R, K, T;
} Columns;

typedef struct {
    float shift, sum;
} Sum;

typedef struct {
    float shift, sum, cross;
} Pair;

static inline int is_harmless(float sum) { return sum > 1e-14f && sum < 1e14f; }

static inline int64_t parts_of(int64_t K) { return (K + TILE - 1) / TILE; }

static inline int64_t columns_of_part(const Columns *c, int64_t start) {
    return c->K - start < TILE ? c->K - start : TILE;
}

/* All lanes of x from n on are 0. */
static inline vec first(int64_t n, vec x) {
    for (int64_t l = n; l < LANES; l++) x[l] = 0;
    return x;
}

/* The target of student row m and slot t, or -1. */
static inline int64_t target_of(const Columns *c, int64_t m, int64_t t) {
    return c->target_rows ? c->target_rows[m * c->T + t] : m;
}

static inline vec target_exponent(const Columns *c, int64_t r, int64_t k, int64_t size) {
    return c->target_scale *
               load_some_from(c->target, r * c->target_stride + k, c->K - k, size) +
           load(c->bias + k);
}

/* Columns start ... start + n of target r: their weights e, zeros up to a multiple of LANES. */
static inline __attribute__((always_inline)) Sum target_tile(
    const Columns *c, int64_t r, int64_t start, int64_t n, float *e, int64_t size) {
    vec sum = {0}, top = (vec){0} - __builtin_inff();
    ivec wild = {0};
    for (int64_t k = 0; k < n; k += LANES) {
        vec power;
        if (c->bias) {
            vec y = target_exponent(c, r, start + k, size);
            wild |= ~(y <= 87.0f);
            power = two_to(LOG2E * y);
        } else {
            power = load_some_from(c->target, r * c->target_stride + start + k, n - k, size);
        }
        sum += power;
        store(e + k, power);
    }
    Sum result = {0, sum_of((float *)&sum)};
    if (!c->bias || (is_harmless(result.sum) && !any(wild))) return result;
    for (int64_t k = 0; k < n; k += LANES)
        top = larger(target_exponent(c, r, start + k, size), top);
    result.shift = largest_of((float *)&top);
    float shift = result.shift == -__builtin_inff() ? 0 : result.shift; /* all of them are -inf */
    sum = (vec){0};
    for (int64_t k = 0; k < n; k += LANES) {
        vec power = two_to(LOG2E * (target_exponent(c, r, start + k, size) - shift));
        sum += power;
        store(e + k, power);
    }
    result.sum = sum_of((float *)&sum);
    return result;
}

/* Of student row m: exponents x and powers p, zeros up to a multiple of LANES. */
static inline __attribute__((always_inline)) Sum student_tile(
    const Columns *c, int64_t m, int64_t start, int64_t n, float *x, float *p, int64_t size) {
    int64_t at = m * c->student_stride + start, whole = n / LANES * LANES;
    vec sum = {0};
    ivec wild = {0};
    float shift = 0;
    for (int attempt = 0; attempt < 2; attempt++) {
        sum = (vec){0};
        for (int64_t k = 0; k < whole; k += LANES) {
            vec z = load_from(c->student, at + k, size), y = c->student_scale * (z - shift);
            vec power = two_to(y);
            wild |= ~(y <= 126.0f);
            sum += power;
            store(x + k, y);
            store(p + k, power);
        }
        if (whole < n) {
            vec z = load_some_from(c->student, at + whole, n - whole, size);
            vec y = first(n - whole, c->student_scale * (z - shift));
            vec power = first(n - whole, two_to(y));
            wild |= ~(y <= 126.0f);
            sum += power;
            store(x + whole, y);
            store(p + whole, power);
        }
        vec lanes = sum;
        float total = sum_of((float *)&lanes);
        if (attempt == 1 || (is_harmless(total) && !any(wild))) return (Sum){shift, total};
        vec top = (vec){0} - __builtin_inff();
        for (int64_t k = 0; k < whole; k += LANES)
            top = larger(load_from(c->student, at + k, size), top);
        shift = largest_of((float *)&top);
        float rest[LANES];
        read_row(rest, c->student, at + whole, n - whole, size);
        for (int64_t k = 0; k < n - whole; k++) shift = rest[k] > shift ? rest[k] : shift;
    }
    return (Sum){0, 0};
}

static inline Pair pair_of(Sum target, const float *e, const float *x, int64_t n) {
    vec sums[4] = {0}; /* a sum waits for the one before */
    int64_t k = 0;
    for (; k + 4 * LANES <= n; k += 4 * LANES)
        for (int i = 0; i < 4; i++) sums[i] += load(e + k + i * LANES) * load(x + k + i * LANES);
    for (; k < n; k += LANES) sums[0] += load(e + k) * load(x + k);
    sums[0] += sums[1] + sums[2] + sums[3];
    return (Pair){target.shift, target.sum, LN2 * sum_of((float *)&sums[0])};
}

static Sum read_target(const Columns *c, int64_t r, int64_t start, float *e) {
    int64_t n = columns_of_part(c, start);
    return c->target_size == 4 ? target_tile(c, r, start, n, e, 4)
                               : target_tile(c, r, start, n, e, 2);
}

static Sum read_student(const Columns *c, int64_t m, int64_t start, float *x, float *p) {
    int64_t n = columns_of_part(c, start);
    return c->student_size == 4 ? student_tile(c, m, start, n, x, p, 4)
                                : student_tile(c, m, start, n, x, p, 2);
}

/* What all kernels take, after their own arguments. */
#define COLUMNS                                                                              \
    const void *student, const void *target, const float *bias, const int64_t *target_rows, \
        int64_t student_stride, int64_t target_stride, int64_t student_size,                 \
        int64_t target_size, float student_scale, float target_scale, int64_t M, int64_t R,  \
        int64_t K, int64_t T, int64_t threads
#define GIVEN                                                                               \
    {student, target, bias, target_rows, student_stride, target_stride, student_size,       \
     target_size, student_scale, target_scale, M, R, K, T}

/* Partials of each part, [parts, M] and [parts, M, T]. A thread takes a row with its target, part
   after part, or a part of all rows, for which it reads every target once. */
int cross_entropy_partials(Sum *student_parts, Pair *target_parts, COLUMNS) {
    Columns c = GIVEN;
    int64_t parts = parts_of(K), targets = target_rows ? R : 1;
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        float *e = aligned_alloc(64, 4 * TILE * (targets + 2)), *x = e + targets * TILE;
        Sum *sums = malloc(sizeof(Sum) * targets);
        failed = e == NULL || sums == NULL;
#pragma omp for schedule(static)
        for (int64_t work = 0; work < (target_rows ? parts : M); work++) {
            if (failed) continue;
            int64_t part = target_rows ? work : 0, end = target_rows ? work + 1 : parts;
            for (; part < end; part++) {
                int64_t start = part * TILE, n = columns_of_part(&c, start);
                for (int64_t r = 0; r < targets; r++)
                    sums[r] = read_target(&c, target_rows ? r : work, start, e + r * TILE);
                int64_t m = target_rows ? 0 : work, end_row = target_rows ? M : work + 1;
                for (; m < end_row; m++) {
                    int64_t at = part * M + m;
                    student_parts[at] = read_student(&c, m, start, x, x + TILE);
                    for (int64_t t = 0; t < T; t++) {
                        int64_t r = target_rows ? target_rows[m * T + t] : 0;
                        if (r >= 0) target_parts[at * T + t] = pair_of(sums[r], e + r * TILE, x, n);
                    }
                }
            }
        }
        free(e);
        free(sums);
    }
    return failed;
}

/* Almost always of 0. */
static inline float exponential_of_gap(float x) { return x == 0 ? 1 : exponential(x); }

/* Merge the partials of row m, which are `step` rows apart: its statistics and its loss. */
static float merged(
    const Columns *c, int64_t m, int64_t parts, int64_t step, const Sum *student,
    const Pair *target, Sum *student_sum, Sum *target_sums) {
    Sum s = {-__builtin_inff(), 0};
    for (int64_t i = 0; i < parts; i++)
        s.shift = student[i * step].shift > s.shift ? student[i * step].shift : s.shift;
    float unit = LN2 * c->student_scale; /* 1 / temperature */
    for (int64_t i = 0; i < parts; i++)
        s.sum += student[i * step].sum * exponential_of_gap(unit * (student[i * step].shift - s.shift));
    *student_sum = s;
    float loss = 0;
    for (int64_t t = 0; t < c->T; t++) {
        Sum w = {-__builtin_inff(), 0};
        float cross = 0;
        if (target_of(c, m, t) < 0) {
            target_sums[t] = (Sum){0, 1};
            continue;
        }
        for (int64_t i = 0; i < parts; i++) {
            float shift = target[i * step * c->T + t].shift;
            w.shift = shift > w.shift ? shift : w.shift;
        }
        for (int64_t i = 0; i < parts; i++) {
            Pair pair = target[i * step * c->T + t];
            if (pair.shift == -__builtin_inff()) continue;
            float weight = exponential_of_gap(pair.shift - w.shift);
            w.sum += weight * pair.sum;
            cross += weight * (pair.cross + pair.sum * unit * (student[i * step].shift - s.shift));
        }
        target_sums[t] = w;
        float log_sum = logf(s.sum);
        loss += c->bias ? log_sum - cross / w.sum : w.sum * log_sum - cross;
    }
    return loss;
}

/* The losses [M] and the statistics [M] and [M, T] from `parts` partials. */
int cross_entropy_finish(
    float *losses, Sum *student_sums, Sum *target_sums, const Sum *student_parts,
    const Pair *target_parts, int64_t parts, COLUMNS) {
    Columns c = GIVEN;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t m = 0; m < M; m++)
        losses[m] = merged(
            &c, m, parts, M, student_parts + m, target_parts + m * T, student_sums + m,
            target_sums + m * T);
    return 0;
}

/* q [TILE] = target r's probabilities in a part. */
static void read_probabilities(const Columns *c, int64_t r, int64_t start, Sum sum, float *q) {
    int64_t n = columns_of_part(c, start), at = r * c->target_stride + start;
    if (!c->bias) return read_row(q, c->target, at, n, c->target_size);
    float factor = 1 / sum.sum;
    for (int64_t k = 0; k < n; k += LANES) {
        vec y = c->target_size == 4 ? target_exponent(c, r, start + k, 4)
                                    : target_exponent(c, r, start + k, 2);
        store(q + k, factor * two_to(LOG2E * (y - sum.shift)));
    }
}

/* Of student row m in a part: (mass p / S - sum_i q_i) * factor, of `count` targets. */
static inline __attribute__((always_inline)) void gradient_tile(
    const Columns *c, int64_t m, int64_t start, Sum sum, float mass, float factor, int64_t count,
    const float *const *q, void *grad, int64_t at, int64_t size) {
    int64_t n = columns_of_part(c, start), from = m * c->student_stride + start;
    for (int64_t k = 0; k < n; k += LANES) {
        vec z = load_some_from(c->student, from + k, n - k, size);
        vec g = mass / sum.sum * two_to(c->student_scale * (z - sum.shift));
        for (int64_t i = 0; i < count; i++) g -= load(q[i] + k);
        store_some_to(grad, at + k, factor * g, n - k, size);
    }
}

static void write_gradient(
    const Columns *c, int64_t m, int64_t start, Sum sum, float mass, float factor, int64_t count,
    const float *const *q, void *grad, int64_t at) {
    if (c->student_size == 2)
        gradient_tile(c, m, start, sum, mass, factor, count, q, grad, at, 2);
    else if (count == 1)
        gradient_tile(c, m, start, sum, mass, factor, 1, q, grad, at, 4);
    else
        gradient_tile(c, m, start, sum, mass, factor, count, q, grad, at, 4);
}

/* grad [M, K], rows `grad_stride` apart, maybe the student's logits themselves:
   (mass p / S - sum_r q_r) * grad_losses / temperature; 0 for rows without a target. */
int cross_entropy_gradient(
    void *grad, int64_t grad_stride, const float *grad_losses, const Sum *student_sums,
    const Sum *target_sums, COLUMNS) {
    Columns c = GIVEN;
    int64_t parts = parts_of(K), targets = target_rows ? R : 1;
    Sum *chosen = calloc(R + 1, sizeof(Sum)); /* of each target, from a pair that it is in */
    int failed = chosen == NULL;
    for (int64_t i = 0; target_rows && !failed && i < M * T; i++)
        if (target_rows[i] >= 0) chosen[target_rows[i]] = target_sums[i];
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        float *q = aligned_alloc(64, 4 * TILE * (targets + 1));
        const float **own = malloc(sizeof(float *) * (T + 1));
        failed |= q == NULL || own == NULL;
#pragma omp for schedule(static)
        for (int64_t work = 0; work < (target_rows ? parts : M); work++) {
            if (failed) continue;
            int64_t part = target_rows ? work : 0, end = target_rows ? work + 1 : parts;
            for (; part < end; part++) {
                int64_t start = part * TILE, n = columns_of_part(&c, start);
                if (!target_rows) read_probabilities(&c, work, start, target_sums[work], q);
                for (int64_t r = 0; target_rows && r < R; r++)
                    if (chosen[r].sum != 0) read_probabilities(&c, r, start, chosen[r], q + r * TILE);
                int64_t m = target_rows ? 0 : work, end_row = target_rows ? M : work + 1;
                for (; m < end_row; m++) {
                    float mass = 0, factor = LN2 * student_scale * grad_losses[m];
                    int64_t count = 0, at = m * grad_stride + start;
                    for (int64_t t = 0; t < T; t++) {
                        int64_t r = target_rows ? target_rows[m * T + t] : 0;
                        if (r < 0) continue;
                        mass += bias ? 1 : target_sums[m * T + t].sum;
                        own[count++] = q + r * TILE;
                    }
                    if (count)
                        write_gradient(
                            &c, m, start, student_sums[m], mass, factor, count, own, grad, at);
                    else
                        memset((char *)grad + at * student_size, 0, n * student_size);
                }
            }
        }
        free(q);
        free(own);
    }
    free(chosen);
    return failed;
}

/* The losses [M] of rows paired with the target of their number, and over the student's logits the
   gradient of their sum with `weights`. */
int cross_entropy_over_logits(float *losses, const float *weights, COLUMNS) {
    Columns c = GIVEN;
    int64_t parts = parts_of(K);
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        float *x = aligned_alloc(64, 4 * TILE * (1 + 2 * parts)), *e = x + TILE;
        float *p = e + TILE * parts;
        Sum *student_parts = malloc(sizeof(Sum) * parts);
        Pair *target_parts = malloc(sizeof(Pair) * parts);
        failed = x == NULL || student_parts == NULL || target_parts == NULL;
#pragma omp for schedule(static)
        for (int64_t m = 0; m < M; m++) {
            if (failed) continue;
            for (int64_t i = 0; i < parts; i++) {
                int64_t start = i * TILE, n = columns_of_part(&c, start);
                Sum weights_sum = read_target(&c, m, start, e + start);
                student_parts[i] = read_student(&c, m, start, x, p + start);
                target_parts[i] = pair_of(weights_sum, e + start, x, n);
            }
            Sum s, w;
            losses[m] = merged(&c, m, parts, 1, student_parts, target_parts, &s, &w);
            float factor = LN2 * student_scale * weights[m];
            for (int64_t i = 0; i < parts; i++) {
                int64_t start = i * TILE, n = columns_of_part(&c, start);
                float a = factor * (bias ? 1 : w.sum) / s.sum *
                          exponential(LN2 * student_scale * (student_parts[i].shift - s.shift));
                float b = factor / (bias ? w.sum : 1) *
                          exponential(target_parts[i].shift - w.shift);
                int64_t at = m * student_stride + start;
                for (int64_t k = 0; k < n; k += LANES) {
                    vec g = a * load(p + start + k) - b * load(e + start + k);
                    store_some_to((void *)student, at + k, g, n - k, student_size);
                }
            }
        }
        free(x);
        free(student_parts);
        free(target_parts);
    }
    return failed;
}
