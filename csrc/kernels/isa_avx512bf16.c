/* isa_avx512bf16.c: AVX-512 with the bf16 instructions (Cooper Lake, Sapphire Rapids, Zen 4): conversion to bf16, and
 * products of pairs of bf16 at twice the rate of f32 for merges of bf16 factors into bf16 weights. */
#if defined(__x86_64__)
#include "pragma_x86.h"
PK_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,bmi,popcnt")
#define WORDS_BF16
#include "words_avx512.h"

static INLINE void pairs_rows(int64_t depth, const uint32_t *row, int64_t ldrow, const uint32_t *panel, float *d,
                              int64_t ldd, float scale, const int mr) {
    vf c[MR][NV];
    for (int i = 0; i < mr; i++)
        for (int v = 0; v < NV; v++) c[i][v] = vf_set1(0);
    for (int64_t p = 0; p < depth; p++, row += ldrow, panel += NV * VFN) {
        __m512bh b[NV];
        for (int v = 0; v < NV; v++) b[v] = (__m512bh)_mm512_loadu_si512(panel + v * VFN);
        for (int i = 0; i < mr; i++) {
            const __m512bh a = (__m512bh)_mm512_set1_epi32((int)row[i]);
            for (int v = 0; v < NV; v++) c[i][v] = _mm512_dpbf16_ps(c[i][v], a, b[v]);
        }
    }
    for (int i = 0; i < mr; i++)
        for (int v = 0; v < NV; v++) vf_store(d + i * ldd + v * VFN, vf_mul(c[i][v], vf_set1(scale)));
}

static void pairs(int64_t depth, const uint32_t *row, int64_t ldrow, const uint32_t *panel, float *d, int64_t ldd,
                  float scale, int mr) {
    if (mr == MR) pairs_rows(depth, row, ldrow, panel, d, ldd, scale, MR);
    else
        for (int i = 0; i < mr; i++) pairs_rows(depth, row + i, ldrow, panel, d + i * ldd, ldd, scale, 1);
}

#define ISA_TABLE pk_isa_avx512bf16
#define ISA_NAME "avx512bf16"
#define ISA_MATH 1
#define ISA_PAIRS pairs
#include "isa.inc"
PK_TARGET_END
#else
typedef int pk_no_avx512bf16;
#endif
