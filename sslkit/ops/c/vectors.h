/* What the kernels share: rows of float32 and bfloat16, vectors, and an exponential.

   Loops over features are written as plain loops, which the compiler turns into vector
   instructions. NaN and infinities go through as they do in PyTorch. */

#ifndef SSLKIT_VECTORS_H
#define SSLKIT_VECTORS_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LANES 16 /* floats of the widest vectors; narrower machines take several for one */

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef float unaligned_vec __attribute__((vector_size(4 * LANES), aligned(4)));

static inline vec load(const float *p) { return *(const unaligned_vec *)p; }

static inline void store(float *p, vec x) { *(unaligned_vec *)p = x; }

/* Of LANES numbers, which are overwritten, in halves. */
static inline float sum_of(float *x) {
    for (int width = LANES / 2; width > 0; width /= 2)
        for (int l = 0; l < width; l++) x[l] += x[l + width];
    return x[0];
}

static inline float largest_of(float *x) {
    for (int width = LANES / 2; width > 0; width /= 2)
        for (int l = 0; l < width; l++) x[l] = x[l + width] > x[l] ? x[l + width] : x[l];
    return x[0];
}

/* The smallest multiple of LANES that holds n floats. */
static inline int64_t padded(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

static inline float from_bfloat16(uint16_t x) {
    union { uint32_t bits; float value; } u = {.bits = (uint32_t)x << 16};
    return u.value;
}

/* To the nearest, ties to even. */
static inline uint16_t to_bfloat16(float x) {
    union { float value; uint32_t bits; } u = {.value = x};
    uint32_t rounded = (u.bits + 0x7FFF + ((u.bits >> 16) & 1)) >> 16;
    return x != x ? 0x7FC0 : rounded;
}

/* Read n elements from position `at` of a tensor whose elements have `size` bytes: 4 or 2. */
static inline void read_row(float *to, const void *from, int64_t at, int64_t n, int64_t size) {
    if (size == 2) {
        const uint16_t *p = (const uint16_t *)from + at;
        for (int64_t i = 0; i < n; i++) to[i] = from_bfloat16(p[i]);
    } else {
        memcpy(to, (const float *)from + at, 4 * n);
    }
}

static inline void write_row(void *to, int64_t at, const float *from, int64_t n, int64_t size) {
    if (size == 2) {
        uint16_t *p = (uint16_t *)to + at;
        for (int64_t i = 0; i < n; i++) p[i] = to_bfloat16(from[i]);
    } else {
        memcpy((float *)to + at, from, 4 * n);
    }
}

/* exp(x) to 2 units in the last place: infinite from 88.7 on, and 0 below -87, where PyTorch's
   results become subnormal. x = k ln 2 + r with |r| <= ln 2 / 2; the polynomial is that of Cephes'
   expf. */
static inline float exponential(float x) {
    float shifted = x * 1.44269504f + 12582912.0f; /* 1.5 * 2^23: k is in the lowest bits */
    float k = shifted - 12582912.0f;
    float r = x - k * 0.693359375f + k * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    union { float value; uint32_t bits; } power = {.value = p * r * r + r + 1.0f};
    union { float value; uint32_t bits; } exponent = {.value = shifted};
    power.bits += exponent.bits << 23;
    float y = x < -87.0f ? 0.0f : x > 88.7f ? __builtin_inff() : power.value;
    return x != x ? x : y;
}

#endif
