/* isa_generic.c: any CPU; GCC's and Clang's vector extension at the width that every 64-bit CPU has.
 *
 * The vector words that an ISA file defines, for vf (VFN floats; vd the same for doubles):
 *   load, store, set1, fma, add, sub, mul    what they say, unaligned
 *   sum        of all lanes, in a fixed order
 *   steps16, steps32, vd_steps    a - b of the stored bits of VFN, VFN, VDN elements, saturated to a byte; mask64: bit i is
 *              set where p[i] is not 0 (all of these have a plain body in isa.inc; WORDS_STEPS: the ISA has its own)
 *   transpose  VFN vectors of VFN lanes, in place
 *   load_bf16, load_f16, put_f32, put_bf16, put_f16    conversions; put rounds, stores, returns what was stored */
#include "dtype.h"
#include "internal.h"

typedef float vf __attribute__((vector_size(16)));
typedef double vd __attribute__((vector_size(16)));
#define VFN 4
#define VDN 2
#define NV 2
#define DOT_M 2
#define ISA_TABLE pk_isa_generic
#define ISA_NAME "generic"
#define ISA_MATH 0
#define ISA_FEW 15, 15, 15, 15

static INLINE vf vf_load(const float *p) {
    vf v;
    memcpy(&v, p, sizeof v);
    return v;
}
static INLINE void vf_store(float *p, vf v) {
    memcpy(p, &v, sizeof v);
}
static INLINE vf vf_set1(float x) {
    return (vf){x, x, x, x};
}
static INLINE vf vf_fma(vf a, vf b, vf c) {
    return a * b + c;
}
static INLINE vf vf_add(vf a, vf b) {
    return a + b;
}
static INLINE vf vf_sub(vf a, vf b) {
    return a - b;
}
static INLINE vf vf_mul(vf a, vf b) {
    return a * b;
}
static INLINE float vf_sum(vf a) {
    return (a[0] + a[2]) + (a[1] + a[3]);
}
static INLINE vf vf_put_f32(float *p, vf v) {
    vf_store(p, v);
    return v;
}
static INLINE vf vf_load_bf16(const uint16_t *p) {
    return (vf){bf16_to_f32(p[0]), bf16_to_f32(p[1]), bf16_to_f32(p[2]), bf16_to_f32(p[3])};
}
static INLINE vf vf_put_bf16(uint16_t *p, vf v) {
    for (int i = 0; i < VFN; i++) p[i] = f32_to_bf16(v[i]);
    return vf_load_bf16(p);
}
static INLINE vf vf_load_f16(const uint16_t *p) {
    return (vf){f16_to_f32(p[0]), f16_to_f32(p[1]), f16_to_f32(p[2]), f16_to_f32(p[3])};
}
static INLINE vf vf_put_f16(uint16_t *p, vf v) {
    for (int i = 0; i < VFN; i++) p[i] = f32_to_f16(v[i]);
    return vf_load_f16(p);
}
static INLINE void vf_transpose(vf *b) {
    vf t[VFN];
    memcpy(t, b, sizeof t);
    for (int i = 0; i < VFN; i++) b[i] = (vf){t[0][i], t[1][i], t[2][i], t[3][i]};
}

static INLINE vd vd_load(const double *p) {
    vd v;
    memcpy(&v, p, sizeof v);
    return v;
}
static INLINE void vd_store(double *p, vd v) {
    memcpy(p, &v, sizeof v);
}
static INLINE vd vd_set1(double x) {
    return (vd){x, x};
}
static INLINE vd vd_fma(vd a, vd b, vd c) {
    return a * b + c;
}
static INLINE vd vd_add(vd a, vd b) {
    return a + b;
}
static INLINE vd vd_sub(vd a, vd b) {
    return a - b;
}
static INLINE vd vd_mul(vd a, vd b) {
    return a * b;
}
static INLINE double vd_sum(vd a) {
    return a[0] + a[1];
}
static INLINE vd vd_put_f64(double *p, vd v) {
    vd_store(p, v);
    return v;
}
static INLINE void vd_transpose(vd *b) {
    const vd t0 = b[0], t1 = b[1];
    b[0] = (vd){t0[0], t1[0]};
    b[1] = (vd){t0[1], t1[1]};
}

#include "isa.inc"
