/* first = first + weight (second - first) for many pairs of float32 arrays, as torch.lerp computes
   it: from the nearer end, so that equal numbers stay equal. */

#include "vectors.h"

int ema_update(
    float *const *firsts, const float *const *seconds, const int64_t *lengths, int64_t pairs,
    float weight, int64_t threads) {
    int near = weight < 0.5f;
    float back = 1 - weight;
#pragma omp parallel num_threads(threads)
    for (int64_t pair = 0; pair < pairs; pair++) {
        float *a = firsts[pair];
        const float *b = seconds[pair];
        /* Each thread has its own part of every pair, and waits for none. */
#pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < lengths[pair]; i++)
            a[i] = near ? a[i] + weight * (b[i] - a[i]) : b[i] - back * (b[i] - a[i]);
    }
    return 0;
}
