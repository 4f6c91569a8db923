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
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef float unaligned_vec __attribute__((vector_size(4 * LANES), aligned(4)));

static inline vec load(const float *p) { return *(const unaligned_vec *)p; }

static inline void store(float *p, vec x) { *(unaligned_vec *)p = x; }

/* a where the mask is all ones, b where it is 0. */
static inline vec choose(ivec mask, vec a, vec b) {
    return (vec)(((ivec)a & mask) | ((ivec)b & ~mask));
}

/* Of a and b, b where one is NaN. */
static inline vec larger(vec a, vec b) { return choose(a > b, a, b); }

/* Whether any element is not 0. */
static inline int any(ivec mask) {
    int32_t found = 0;
    for (int l = 0; l < LANES; l++) found |= mask[l];
    return found != 0;
}

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

/* LANES elements from position `at` of a tensor whose elements have `size` bytes: 4 or 2. */
static inline vec load_from(const void *p, int64_t at, int64_t size) {
    typedef uint32_t words __attribute__((vector_size(4 * LANES)));
    typedef uint16_t halves __attribute__((vector_size(2 * LANES), aligned(2)));
    if (size == 4) return load((const float *)p + at);
    return (vec)(__builtin_convertvector(*(const halves *)((const uint16_t *)p + at), words) << 16);
}

/* The first n of them, and zeros. */
static inline vec load_some_from(const void *p, int64_t at, int64_t n, int64_t size) {
    if (n >= LANES) return load_from(p, at, size);
    float x[LANES] = {0};
    read_row(x, p, at, n, size);
    return load(x);
}

/* x to the LANES elements from position `at`, or to the first n of them; rounded as to_bfloat16. */
static inline void store_some_to(void *p, int64_t at, vec x, int64_t n, int64_t size) {
    typedef uint32_t words __attribute__((vector_size(4 * LANES)));
    typedef uint16_t halves __attribute__((vector_size(2 * LANES), aligned(2)));
    if (n < LANES) {
        write_row(p, at, (float *)&x, n, size);
    } else if (size == 4) {
        store((float *)p + at, x);
    } else {
        words bits = (words)x, rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
        rounded |= (words)(x != x) & 0x7FC0; /* of a NaN, after a carry as well */
        *(halves *)((uint16_t *)p + at) = __builtin_convertvector(rounded, halves);
    }
}

#define LOG2E 1.44269504f

/* 2^x to 1.5 units in the last place for x <= 126; 0 below -126; NaN for NaN. 2^r, |r| <= 1/2, is
   the polynomial of degree 5 with value 1 at 0 and the smallest largest relative error, 9e-8. */
static inline vec two_to(vec x) {
    vec shifted = x + 12582912.0f; /* 1.5 * 2^23: the whole part is in the lowest bits */
    vec r = x - (shifted - 12582912.0f);
    vec p = 1.32647e-3f * r + 9.67151e-3f;
    p = p * r + 5.550734e-2f;
    p = p * r + 0.24022242f;
    p = p * r + 0.69314698f;
    p = p * r + 1.0f;
    ivec power = (ivec)p + ((ivec)shifted << 23);
    return (vec)((power & ~(x < -126.0f)) | (x != x));
}

/* to [padded(K)] = log2(e) bias, and then -inf, where powers of two are 0. */
static inline void scale_bias(float *to, const float *bias, int64_t K) {
    for (int64_t k = 0; k < K; k++) to[k] = LOG2E * bias[k];
    for (int64_t k = K; k < padded(K); k++) to[k] = -__builtin_inff();
}

/* exp(x) to 2 units in the last place: infinite from 88.7 on, and 0 below -87, where PyTorch's
   results become subnormal. x = k ln 2 + r with |r| <= ln 2 / 2; the polynomial is that of Cephes'
   expf. */
static inline float exponential(float x) {
    float shifted = x * LOG2E + 12582912.0f; /* 1.5 * 2^23: k is in the lowest bits */
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
