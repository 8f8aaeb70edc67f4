/* words_avx512.h: the vector words of AVX-512 (what they mean: isa_generic.c). With WORDS_BF16, conversion to bf16 is the
 * CPU's own. To be included after a target pragma. */
#ifndef PEFT_C_KERNELS_WORDS_AVX512_H
#define PEFT_C_KERNELS_WORDS_AVX512_H

#include <immintrin.h>

#include "dtype.h"
#include "internal.h"

typedef __m512 vf;
typedef __m512d vd;
#define VFN 16
#define VDN 8
#define NV 4
#define DOT_M 6
#define ISA_FEW 48, 15, 48, 96
#define FUSED_ROWS 3
#define WORDS_STEPS
#define WORDS_SUMS

static INLINE vf vf_load(const float *p) {
    return _mm512_loadu_ps(p);
}
static INLINE void vf_store(float *p, vf v) {
    _mm512_storeu_ps(p, v);
}
static INLINE vf vf_set1(float x) {
    return _mm512_set1_ps(x);
}
static INLINE vf vf_fma(vf a, vf b, vf c) {
    return _mm512_fmadd_ps(a, b, c);
}
static INLINE vf vf_add(vf a, vf b) {
    return _mm512_add_ps(a, b);
}
static INLINE vf vf_sub(vf a, vf b) {
    return _mm512_sub_ps(a, b);
}
static INLINE vf vf_mul(vf a, vf b) {
    return _mm512_mul_ps(a, b);
}
static INLINE float vf_sum(vf a) {
    const __m256 s = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
    __m128 q = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    q = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}
/* [a0 + a2, a1 + a3, b0 + b2, b1 + b3] of the quarters of a and b */
static INLINE vf halves_sum(vf a, vf b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
}
/* one quarter for each of four vectors: the sum of its quarters, added as vf_sum does */
static INLINE vf quarters_sum(vf a, vf b, vf c, vf d) {
    const vf ab = halves_sum(a, b), cd = halves_sum(c, d);
    return _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
}
static INLINE vf lanes_sum(vf a, vf b) {
    return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
}
/* to[i] = vf_sum(c[i]), i < n: the same bits, sixteen at once */
static INLINE void vf_sums(const vf *c, const int n, float *to) {
    const vf zero = _mm512_setzero_ps();
    for (int i = 0; i < n; i += 16) {
        vf q[4];
        for (int e = 0; e < 4; e++)
            q[e] = quarters_sum(i + e < n ? c[i + e] : zero, i + 4 + e < n ? c[i + 4 + e] : zero,
                                i + 8 + e < n ? c[i + 8 + e] : zero, i + 12 + e < n ? c[i + 12 + e] : zero);
        const __m512d u = _mm512_castps_pd(lanes_sum(q[0], q[1]));
        const __m512d v = _mm512_castps_pd(lanes_sum(q[2], q[3]));
        const vf s =
            _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(u, v)), _mm512_castpd_ps(_mm512_unpackhi_pd(u, v)));
        if (i + 16 <= n)
            _mm512_storeu_ps(to + i, s);
        else
            _mm512_mask_storeu_ps(to + i, (__mmask16)((1u << (n - i)) - 1), s);
    }
}
static INLINE void steps16(const uint16_t *a, const uint16_t *b, int8_t *to) {
    const __m256i x = _mm256_loadu_si256((const __m256i *)(const void *)a);
    const __m256i y = _mm256_loadu_si256((const __m256i *)(const void *)b);
    _mm_storeu_si128((__m128i *)(void *)to, _mm256_cvtsepi16_epi8(_mm256_sub_epi16(x, y)));
}
static INLINE void steps32(const float *a, const float *b, int8_t *to) {
    const __m512i d = _mm512_sub_epi32(_mm512_loadu_si512(a), _mm512_loadu_si512(b));
    _mm_storeu_si128((__m128i *)(void *)to, _mm512_cvtsepi32_epi8(d));
}
static INLINE void vd_steps(const double *a, const double *b, int8_t *to) {
    const __m512i d = _mm512_sub_epi64(_mm512_loadu_si512(a), _mm512_loadu_si512(b));
    _mm_storel_epi64((__m128i *)(void *)to, _mm512_cvtsepi64_epi8(d));
}
static INLINE uint64_t mask64(const int8_t *p) {
    const __m512i v = _mm512_loadu_si512(p);
    return _mm512_test_epi8_mask(v, v);
}
static INLINE vf vf_put_f32(float *p, vf v) {
    _mm512_storeu_ps(p, v);
    return v;
}
static INLINE vf vf_load_bf16(const uint16_t *p) {
    const __m256i h = _mm256_loadu_si256((const __m256i *)(const void *)p);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}
static INLINE vf vf_put_bf16_by_hand(uint16_t *p, vf v) {
    const __m512i u = _mm512_castps_si512(v), one = _mm512_set1_epi32(1);
    const __m512i even = _mm512_and_si512(_mm512_srli_epi32(u, 16), one);
    __m512i r = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), even), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    r = _mm512_mask_or_epi32(r, nan, _mm512_srli_epi32(u, 16), _mm512_set1_epi32(0x40));
    _mm256_storeu_si256((__m256i *)(void *)p, _mm512_cvtepi32_epi16(r));
    return _mm512_castsi512_ps(_mm512_slli_epi32(r, 16));
}
#ifdef WORDS_BF16
/* the instruction takes subnormals for zero: those are left to the integer unit */
static INLINE uint32_t vf_odd_bf16(uint32_t mask, vf v) {
    return _kor_mask16((__mmask16)mask, _mm512_fpclass_ps_mask(v, 0x20));
}
static INLINE vf vf_quick_bf16(uint16_t *p, vf v) {
    const __m256i h = (__m256i)_mm512_cvtneps_pbh(v);
    _mm256_storeu_si256((__m256i *)(void *)p, h);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}
/* two at once; 0 if none of them was subnormal, or another value that gives a zero */
static INLINE uint32_t vf_quick_bf16_two(uint16_t *p, vf a, vf b) {
    const __m512i h = (__m512i)_mm512_cvtne2ps_pbh(b, a);
    _mm512_storeu_si512(p, h);
    return _mm512_testn_epi16_mask(h, _mm512_set1_epi16(0x7fff));
}
static INLINE __m512bh vf_load_pairs(const uint16_t *p) {
    return (__m512bh)_mm512_loadu_si512(p);
}
static INLINE vf vf_dot_pairs(__m512bh a, __m512bh b, vf c) {
    return _mm512_dpbf16_ps(c, a, b);
}
static INLINE vf vf_put_bf16(uint16_t *p, vf v) {
    return __builtin_expect(vf_odd_bf16(0, v) != 0, 0) ? vf_put_bf16_by_hand(p, v) : vf_quick_bf16(p, v);
}
#else
static INLINE vf vf_put_bf16(uint16_t *p, vf v) {
    return vf_put_bf16_by_hand(p, v);
}
#endif
static INLINE vf vf_load_f16(const uint16_t *p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)p));
}
static INLINE vf vf_put_f16(uint16_t *p, vf v) {
    const __m256i h = _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_storeu_si256((__m256i *)(void *)p, h);
    return _mm512_cvtph_ps(h);
}
static INLINE void vf_transpose(vf *b) {
    vf t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_ps(b[i], b[i + 1]);
        t[i + 1] = _mm512_unpackhi_ps(b[i], b[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            const __m512d lo = _mm512_castps_pd(t[i + j]), hi = _mm512_castps_pd(t[i + j + 2]);
            b[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(lo, hi));
            b[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(lo, hi));
        }
    for (int i = 0; i < 16; i += 8)
        for (int j = 0; j < 4; j++) {
            t[i + j] = _mm512_shuffle_f32x4(b[i + j], b[i + j + 4], 0x88);
            t[i + j + 4] = _mm512_shuffle_f32x4(b[i + j], b[i + j + 4], 0xdd);
        }
    for (int j = 0; j < 8; j++) {
        b[j] = _mm512_shuffle_f32x4(t[j], t[j + 8], 0x88);
        b[j + 8] = _mm512_shuffle_f32x4(t[j], t[j + 8], 0xdd);
    }
}

static INLINE vd vd_load(const double *p) {
    return _mm512_loadu_pd(p);
}
static INLINE void vd_store(double *p, vd v) {
    _mm512_storeu_pd(p, v);
}
static INLINE vd vd_set1(double x) {
    return _mm512_set1_pd(x);
}
static INLINE vd vd_fma(vd a, vd b, vd c) {
    return _mm512_fmadd_pd(a, b, c);
}
static INLINE vd vd_add(vd a, vd b) {
    return _mm512_add_pd(a, b);
}
static INLINE vd vd_sub(vd a, vd b) {
    return _mm512_sub_pd(a, b);
}
static INLINE vd vd_mul(vd a, vd b) {
    return _mm512_mul_pd(a, b);
}
static INLINE double vd_sum(vd a) {
    const __m256d s = _mm256_add_pd(_mm512_castpd512_pd256(a), _mm512_extractf64x4_pd(a, 1));
    const __m128d q = _mm_add_pd(_mm256_castpd256_pd128(s), _mm256_extractf128_pd(s, 1));
    return _mm_cvtsd_f64(_mm_add_sd(q, _mm_unpackhi_pd(q, q)));
}
static INLINE vd vd_put_f64(double *p, vd v) {
    _mm512_storeu_pd(p, v);
    return v;
}
static INLINE void vd_transpose(vd *b) {
    vd t[8];
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm512_unpacklo_pd(b[i], b[i + 1]);
        t[i + 1] = _mm512_unpackhi_pd(b[i], b[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            b[i + j] = _mm512_shuffle_f64x2(t[i + j], t[i + j + 2], 0x88);
            b[i + j + 2] = _mm512_shuffle_f64x2(t[i + j], t[i + j + 2], 0xdd);
        }
    for (int j = 0; j < 4; j++) {
        t[j] = _mm512_shuffle_f64x2(b[j], b[j + 4], 0x88);
        t[j + 4] = _mm512_shuffle_f64x2(b[j], b[j + 4], 0xdd);
    }
    memcpy(b, t, sizeof t);
}

#endif
