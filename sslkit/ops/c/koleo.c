/* The KoLeo loss of rows x [B, D]: z = x / |x|, for each row the nearest other one, and

       loss = -sum_i log(d_i + eps) / B,        d_i = |z_i - z_nearest(i)|

   The similarities z z^T, a matrix product, are PyTorch's. */

#include <math.h>

#include "vectors.h"

static inline float inner(const float *a, const float *b, int64_t n) {
    float sums[LANES] = {0};
    int64_t k = 0;
    for (; k + LANES <= n; k += LANES)
        for (int l = 0; l < LANES; l++) sums[l] += a[k + l] * b[k + l];
    for (; k < n; k++) sums[k % LANES] += a[k] * b[k];
    return sum_of(sums);
}

/* z [B, D] and the lengths [B] of x, infinity for rows of zeros. A power of two, the largest that is
   at most the row's largest number, is taken out of the row first: squares stay in range. */
int koleo_unit_rows(
    float *z, float *length, const float *x, int64_t B, int64_t D, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < B; i++) {
        const float *from = x + i * D;
        float *to = z + i * D;
        uint32_t largest = 0; /* bits of |x| are in the order of |x|, NaN above all */
        for (int64_t k = 0; k < D; k++) {
            union { float value; uint32_t bits; } u = {.value = from[k]};
            u.bits &= 0x7FFFFFFF;
            largest = u.bits > largest ? u.bits : largest;
        }
        union { uint32_t bits; float value; } power = {.bits = largest & 0x7F800000};
        if (power.bits == 0) power.bits = 0x00800000;       /* subnormal */
        if (power.bits > 0x7E800000) power.bits = 0x7E800000; /* its inverse is normal as well */
        float inverse = 1 / power.value;
        for (int64_t k = 0; k < D; k++) to[k] = from[k] * inverse;
        float scaled = largest ? sqrtf(inner(to, to, D)) : __builtin_inff();
        for (int64_t k = 0; k < D; k++) to[k] /= scaled;
        length[i] = scaled * power.value;
    }
    return 0;
}

/* nearest [B] and distance [B] from the similarities [B, B], and the loss. */
int koleo_loss(
    float *loss, int64_t *nearest, float *distance, const float *z, const float *similarity,
    float eps, int64_t B, int64_t D, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < B; i++) {
        const float *row = similarity + i * B;
        float top = -__builtin_inff();
        for (int64_t j = 0; j < B; j++) top = j != i && row[j] > top ? row[j] : top;
        int64_t found = 0;
        while (found == i || row[found] < top) found++; /* NaN is found, too */
        float square[LANES] = {0};
        const float *a = z + i * D, *b = z + found * D;
        int64_t k = 0;
        for (; k + LANES <= D; k += LANES)
            for (int l = 0; l < LANES; l++) {
                float difference = a[k + l] - b[k + l];
                square[l] += difference * difference;
            }
        for (; k < D; k++) square[k % LANES] += (a[k] - b[k]) * (a[k] - b[k]);
        nearest[i] = found;
        distance[i] = sqrtf(sum_of(square));
    }
    double total = 0;
    for (int64_t i = 0; i < B; i++) total -= logf(distance[i] + eps);
    *loss = total / B;
    return 0;
}

/* dx [B, D]. With f_i = -grad / (B (d_i + eps) d_i), 0 where d_i is 0, and n = nearest:
   dz_i = f_i (z_i - z_n(i)) - sum of f_j (z_j - z_i) over the j whose n(j) is i,
   dx_i = (dz_i - z_i <z_i, dz_i>) / |x_i|. */
int koleo_backward(
    float *dx, const float *grad, const float *z, const float *length, const int64_t *nearest,
    const float *distance, float eps, int64_t B, int64_t D, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < B; i++) {
        float *dz = dx + i * D;
        memset(dz, 0, 4 * D);
        for (int64_t j = 0; j < B; j++) {
            if (j != i && nearest[j] != i) continue;
            float d = distance[j], factor = d == 0 ? 0 : -*grad / (B * (d + eps) * d);
            const float *other = z + (j == i ? nearest[i] : j) * D, *own = z + i * D;
            for (int64_t k = 0; k < D; k++) dz[k] += factor * (own[k] - other[k]);
        }
        float along = inner(z + i * D, dz, D);
        for (int64_t k = 0; k < D; k++) dz[k] = (dz[k] - z[i * D + k] * along) / length[i];
    }
    return 0;
}
