/* isa_neon.c: AArch64 Advanced SIMD (every 64-bit Arm). */
#if defined(__aarch64__)
#include <arm_neon.h>

#include "dtype.h"
#include "internal.h"

typedef float32x4_t vf;
typedef float64x2_t vd;
#define VFN 4
#define VDN 2
#define NV 4
#define DOT_M 4
#define ISA_TABLE pk_isa_neon
#define ISA_NAME "neon"
#define ISA_MATH 1
#define ISA_FEW 15, 15, 15, 15

static INLINE vf vf_load(const float *p) {
    return vld1q_f32(p);
}
static INLINE void vf_store(float *p, vf v) {
    vst1q_f32(p, v);
}
static INLINE vf vf_set1(float x) {
    return vdupq_n_f32(x);
}
static INLINE vf vf_fma(vf a, vf b, vf c) {
    return vfmaq_f32(c, a, b);
}
static INLINE vf vf_add(vf a, vf b) {
    return vaddq_f32(a, b);
}
static INLINE vf vf_sub(vf a, vf b) {
    return vsubq_f32(a, b);
}
static INLINE vf vf_mul(vf a, vf b) {
    return vmulq_f32(a, b);
}
static INLINE float vf_sum(vf a) {
    return vaddvq_f32(a);
}
static INLINE vf vf_put_f32(float *p, vf v) {
    vst1q_f32(p, v);
    return v;
}
static INLINE vf vf_load_bf16(const uint16_t *p) {
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16));
}
static INLINE vf vf_put_bf16(uint16_t *p, vf v) {
    const uint32x4_t u = vreinterpretq_u32_f32(v), high = vshrq_n_u32(u, 16);
    const uint32x4_t even = vandq_u32(high, vdupq_n_u32(1));
    const uint32x4_t rounded = vshrq_n_u32(vaddq_u32(vaddq_u32(u, vdupq_n_u32(0x7fff)), even), 16);
    const uint16x4_t h = vmovn_u32(vbslq_u32(vceqq_f32(v, v), rounded, vorrq_u32(high, vdupq_n_u32(0x40))));
    vst1_u16(p, h);
    return vreinterpretq_f32_u32(vshll_n_u16(h, 16));
}
static INLINE vf vf_load_f16(const uint16_t *p) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
}
static INLINE vf vf_put_f16(uint16_t *p, vf v) {
    const float16x4_t h = vcvt_f16_f32(v);
    vst1_u16(p, vreinterpret_u16_f16(h));
    return vcvt_f32_f16(h);
}
static INLINE void vf_transpose(vf *b) {
    const float32x4x2_t p = vtrnq_f32(b[0], b[1]), q = vtrnq_f32(b[2], b[3]);
    b[0] = vcombine_f32(vget_low_f32(p.val[0]), vget_low_f32(q.val[0]));
    b[1] = vcombine_f32(vget_low_f32(p.val[1]), vget_low_f32(q.val[1]));
    b[2] = vcombine_f32(vget_high_f32(p.val[0]), vget_high_f32(q.val[0]));
    b[3] = vcombine_f32(vget_high_f32(p.val[1]), vget_high_f32(q.val[1]));
}

static INLINE vd vd_load(const double *p) {
    return vld1q_f64(p);
}
static INLINE void vd_store(double *p, vd v) {
    vst1q_f64(p, v);
}
static INLINE vd vd_set1(double x) {
    return vdupq_n_f64(x);
}
static INLINE vd vd_fma(vd a, vd b, vd c) {
    return vfmaq_f64(c, a, b);
}
static INLINE vd vd_add(vd a, vd b) {
    return vaddq_f64(a, b);
}
static INLINE vd vd_sub(vd a, vd b) {
    return vsubq_f64(a, b);
}
static INLINE vd vd_mul(vd a, vd b) {
    return vmulq_f64(a, b);
}
static INLINE double vd_sum(vd a) {
    return vaddvq_f64(a);
}
static INLINE vd vd_put_f64(double *p, vd v) {
    vst1q_f64(p, v);
    return v;
}
static INLINE void vd_transpose(vd *b) {
    const vd t0 = b[0], t1 = b[1];
    b[0] = vzip1q_f64(t0, t1);
    b[1] = vzip2q_f64(t0, t1);
}

#include "isa.inc"
#else
typedef int pk_no_neon;
#endif
