/* isa_avx512bf16.c: AVX-512 with the bf16 instructions and VBMI2 (Sapphire Rapids, Zen 4): conversion to bf16, and
 * products of pairs of bf16 at twice the rate of f32 for merges of bf16 factors into bf16 weights. */
#if defined(__x86_64__)
#include "pragma_x86.h"
PK_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi,avx512vbmi2,avx2,fma,f16c,bmi,popcnt")
#define WORDS_BF16
#define WORDS_CODE
#include "words_avx512.h"

/* see code.inc: up to 16 places at once */
static INLINE int code_plain(unsigned char *to, const int8_t *steps, uint64_t mask, int64_t before) {
    static const unsigned char count[64] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15,
                                            16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31,
                                            32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43, 44, 45, 46, 47,
                                            48, 49, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61, 62, 63};
    const __m512i v = _mm512_loadu_si512(steps);
    const __m128i at = _mm512_castsi512_si128(_mm512_maskz_compress_epi8(mask, _mm512_loadu_si512(count)));
    const __m128i step = _mm512_castsi512_si128(_mm512_maskz_compress_epi8(mask, v));
    const __m128i gap = _mm_sub_epi8(at, _mm_mask_set1_epi8(_mm_slli_si128(at, 1), 1, (char)before));
    const __mmask64 far = _mm512_cmplt_epu8_mask(_mm512_sub_epi8(v, _mm512_set1_epi8(127)), _mm512_set1_epi8(2));
    _mm_storeu_si128((__m128i *)(void *)to, _mm_unpacklo_epi8(gap, step));
    _mm_storeu_si128((__m128i *)(void *)(to + 16), _mm_unpackhi_epi8(gap, step));
    return !((far & mask) | (uint64_t)(__builtin_popcountll(mask) > 16));
}

static INLINE void pairs_sum(int64_t depth, const uint32_t *row, int64_t ldrow, const uint32_t *panel, float scale,
                             vf (*c)[NV], const int mr) {
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

static INLINE void pairs_tile_sum(const pk_tile *t, const int i0, vf (*c)[NV], const int mr) {
    pairs_sum(t->depth, (const uint32_t *)t->row + i0, t->ldrow, t->panel, t->scale, c, mr);
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
#include "isa.inc"
PK_TARGET_END
#else
typedef int pk_no_avx512bf16;
#endif
