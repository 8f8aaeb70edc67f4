/* dtype.h: the scalar side of the dtypes: sizes, conversions, one element at a time (vectors: isa_*.c). */
#ifndef PEFT_C_KERNELS_DTYPE_H
#define PEFT_C_KERNELS_DTYPE_H

#include <string.h>

#include "kernels.h"

static inline uint32_t f32_bits(float v) {
    uint32_t u;
    memcpy(&u, &v, 4);
    return u;
}

static inline float f32_of(uint32_t u) {
    float v;
    memcpy(&v, &u, 4);
    return v;
}

static inline float bf16_to_f32(uint16_t h) {
    return f32_of((uint32_t)h << 16);
}

static inline uint16_t f32_to_bf16(float v) {
    uint32_t u = f32_bits(v);
    if ((u & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((u >> 16) | 0x40u);
    return (uint16_t)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

static inline float f16_to_f32(uint16_t h) {
    const uint32_t sign = (uint32_t)(h & 0x8000u) << 16, mag = h & 0x7fffu;
    if (mag >= 0x7c00u) return f32_of(sign | 0x7f800000u | ((mag & 0x3ffu) << 13) | (mag > 0x7c00u ? 0x400000u : 0u));
    if (mag >= 0x400u) return f32_of(sign | ((mag << 13) + 0x38000000u));
    const float v = (float)mag * 0x1p-24f;
    return f32_of(sign | f32_bits(v));
}

static inline uint16_t f32_to_f16(float v) {
    const uint32_t u = f32_bits(v), sign = (u >> 16) & 0x8000u, mag = u & 0x7fffffffu;
    if (mag > 0x7f800000u) return (uint16_t)(sign | 0x7e00u | ((mag >> 13) & 0x1ffu));
    if (mag >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u);
    if (mag < 0x38800000u) { /* subnormal: the adder rounds for us at 2^-24 */
        const float r = f32_of(mag) + 0.5f;
        return (uint16_t)(sign | (f32_bits(r) - 0x3f000000u));
    }
    return (uint16_t)(sign | ((mag - 0x38000000u + 0xfffu + ((mag >> 13) & 1u)) >> 13));
}

/* to f32 so that rounding the result once more, to 11 bits or fewer, is one rounding: round to odd */
static inline float f64_to_f32_odd(double v) {
    const float f = (float)v;
    if ((double)f == v || v != v) return f;
    uint32_t u = f32_bits(f);
    const double mag = v < 0 ? -v : v, fmag = (double)f32_of(u & 0x7fffffffu);
    if (fmag > mag) u -= 1;
    return f32_of(u | 1u);
}

/* the difference of the bits, saturated to a byte */
static inline int8_t step_byte(int64_t d) {
    return (int8_t)(d > 127 ? 127 : d < -128 ? -128 : d);
}

/* what saturated does not say the difference */
static inline int step_is_far(int8_t step) {
    return step == 127 || step == -128;
}

static inline int8_t step64(const void *a, const void *b) {
    uint64_t x, y;
    memcpy(&x, a, 8);
    memcpy(&y, b, 8);
    return step_byte((int64_t)(x - y));
}

static inline double scalar_load(pk_dtype dtype, const void *p) {
    switch (dtype) {
    case PK_F64: {
        double v;
        memcpy(&v, p, 8);
        return v;
    }
    case PK_F32: {
        float v;
        memcpy(&v, p, 4);
        return (double)v;
    }
    case PK_BF16:
    case PK_F16:
    default: {
        uint16_t h;
        memcpy(&h, p, 2);
        return (double)(dtype == PK_BF16 ? bf16_to_f32(h) : f16_to_f32(h));
    }
    }
}

static inline void scalar_store(pk_dtype dtype, void *p, double v) {
    const float f = (float)v;
    const uint16_t h = dtype == PK_BF16 ? f32_to_bf16(f64_to_f32_odd(v))
                                        : (dtype == PK_F16 ? f32_to_f16(f64_to_f32_odd(v)) : (uint16_t)0);
    if (dtype == PK_F64)
        memcpy(p, &v, 8);
    else if (dtype == PK_F32)
        memcpy(p, &f, 4);
    else
        memcpy(p, &h, 2);
}

#endif
