/* isa_avx512bf16.c: AVX-512 with the bf16 instructions, VBMI2 and BMI2 (Sapphire Rapids, Zen 4): conversion to bf16, and
 * products of pairs of bf16 at twice the rate of f32 for merges of bf16 factors into bf16 weights. */
#if defined(__x86_64__)
#include "pragma_x86.h"
PK_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi,avx512vbmi2,avx2,fma,f16c,bmi,bmi2,popcnt")
#define WORDS_BF16
#include "words_avx512.h"

static INLINE void pairs_sum(int64_t depth, const uint32_t *row, int64_t ldrow, const uint32_t *panel, float scale,
                             vf (*c)[NV], const int mr) {
#pragma GCC unroll 4
    for (int64_t p = 0; p < depth; p++, row += ldrow, panel += NV * VFN) {
        __m512bh b[NV];
        for (int v = 0; v < NV; v++) b[v] = (__m512bh)_mm512_loadu_si512(panel + v * VFN);
        for (int i = 0; i < mr; i++) {
            const __m512bh a = (__m512bh)_mm512_set1_epi32((int)row[i]);
            for (int v = 0; v < NV; v++) c[i][v] = _mm512_dpbf16_ps(c[i][v], a, b[v]);
        }
    }
    for (int i = 0; i < mr; i++)
        for (int v = 0; v < NV; v++) c[i][v] = vf_mul(c[i][v], vf_set1(scale));
}

static INLINE void pairs_strip_sum(const pk_strip *s, int64_t j, const int i0, vf (*c)[NV], const int mr) {
    pairs_sum(s->depth, (const uint32_t *)s->row + i0, s->ldrow, (const uint32_t *)s->panel + j * s->depth, s->scale,
              c, mr);
}

static void pairs(int64_t depth, const uint32_t *row, int64_t ldrow, const uint32_t *panel, float *d, int64_t ldd,
                  float scale, int mr) {
    for (int i = 0; i < mr; i++) {
        vf c[1][NV];
        for (int v = 0; v < NV; v++) c[0][v] = vf_set1(0);
        pairs_sum(depth, row + i, ldrow, panel, scale, c, 1);
        for (int v = 0; v < NV; v++) vf_store(d + i * ldd + v * VFN, c[0][v]);
    }
}

#define ISA_TABLE pk_isa_avx512bf16
#define ISA_NAME "avx512bf16"
#define ISA_MATH 1
#define ISA_PAIRS pairs
#define ISA_TRACED "traced_avx512.inc"
#include "isa.inc"
PK_TARGET_END
#else
typedef int pk_no_avx512bf16;
#endif
