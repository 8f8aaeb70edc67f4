/* isa_avx512bf16.c: AVX-512 with the bf16 instructions, VBMI2 and BMI2 (Sapphire Rapids, Zen 4): conversion to bf16, and
 * products of pairs of bf16 at twice the rate of f32 for merges of bf16 factors into bf16 weights. */
#if defined(__x86_64__)
#include "pragma_x86.h"
PK_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi,avx512vbmi2,avx2,fma,f16c,bmi,bmi2,popcnt")
#define WORDS_BF16
#define WORDS_BF16_PAIRS __m512bh
#include "words_avx512.h"

static INLINE void pairs_sum(int64_t depth, const uint32_t *row, int64_t sp, int64_t si, const uint32_t *panel,
                             float scale, vf (*c)[NV], const int mr) {
#pragma GCC unroll 4
    for (int64_t p = 0; p < depth; p++, row += sp, panel += NV * VFN) {
        __m512bh b[NV];
        for (int v = 0; v < NV; v++) b[v] = (__m512bh)_mm512_loadu_si512(panel + v * VFN);
        for (int i = 0; i < mr; i++) {
            const __m512bh a = (__m512bh)_mm512_set1_epi32((int)row[i * si]);
            for (int v = 0; v < NV; v++) c[i][v] = _mm512_dpbf16_ps(c[i][v], a, b[v]);
        }
    }
    if (scale == 1) return;
    for (int i = 0; i < mr; i++)
        for (int v = 0; v < NV; v++) c[i][v] = vf_mul(c[i][v], vf_set1(scale));
}

static INLINE void pairs_strip_sum(const pk_strip *s, int64_t j, const int i0, vf (*c)[NV], const int mr) {
    pairs_sum(s->depth, (const uint32_t *)s->row + i0, s->ldrow, 1, (const uint32_t *)s->panel + j * s->depth,
              s->scale, c, mr);
}

static INLINE void pairs_rows(int64_t depth, const uint32_t *row, int64_t sp, int64_t si, const uint32_t *panel,
                              float *d, int64_t ldd, float scale, const int mr, int add) {
    vf c[MR][NV];
    for (int i = 0; i < mr; i++)
        for (int v = 0; v < NV; v++) c[i][v] = vf_set1(0);
    pairs_sum(depth, row, sp, si, panel, scale, c, mr);
    for (int i = 0; i < mr; i++)
        for (int v = 0; v < NV; v++) {
            float *const to = d + i * ldd + v * VFN;
            vf_store(to, add ? vf_add(vf_load(to), c[i][v]) : c[i][v]);
        }
}

static void pairs(int64_t depth, const uint32_t *row, int64_t sp, int64_t si, const uint32_t *panel, float *d,
                  int64_t ldd, float scale, int mr, int add) {
    if (mr == MR) {
        pairs_rows(depth, row, sp, si, panel, d, ldd, scale, MR, add);
        return;
    }
    for (; mr >= 2; mr -= 2, row += 2 * si, d += 2 * ldd) pairs_rows(depth, row, sp, si, panel, d, ldd, scale, 2, add);
    if (mr) pairs_rows(depth, row, sp, si, panel, d, ldd, scale, 1, add);
}

/* 16 x 16 pairs whose halves lie side by side */
static INLINE void turn_pairs(const uint16_t *src, int64_t sj, uint32_t *dst, int64_t ld) {
    vf b[VFN];
    for (int j = 0; j < VFN; j++) b[j] = _mm512_castsi512_ps(_mm512_loadu_si512(src + j * sj));
    vf_transpose(b);
    for (int p = 0; p < VFN; p++) _mm512_storeu_si512(dst + p * ld, _mm512_castps_si512(b[p]));
}

/* dst[j] = low[j] and high[j], j < n */
static INLINE void join_pairs(const uint16_t *low, const uint16_t *high, int64_t n, uint32_t *dst) {
    static const uint16_t first[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                       8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i from = _mm512_loadu_si512(first), next = _mm512_add_epi16(from, _mm512_set1_epi16(16));
    int64_t j = 0;
    for (; j + 32 <= n; j += 32) {
        const __m512i x = _mm512_loadu_si512(low + j), y = _mm512_loadu_si512(high + j);
        _mm512_storeu_si512(dst + j, _mm512_permutex2var_epi16(x, from, y));
        _mm512_storeu_si512(dst + j + 16, _mm512_permutex2var_epi16(x, next, y));
    }
    for (; j < n; j++) dst[j] = low[j] | (uint32_t)high[j] << 16;
}

static void pack_pairs(const uint16_t *src, int64_t sp, int64_t sj, int64_t np, int64_t nj, uint32_t *dst,
                       int64_t ld) {
    const int64_t turned = sp == 1 ? np / 2 / VFN * VFN : 0, cols = sp == 1 ? nj / VFN * VFN : 0;
    for (int64_t j = 0; j < cols; j += VFN) /* along the rows: they may share cache sets */
        for (int64_t p = 0; p < turned; p += VFN) turn_pairs(src + 2 * p + j * sj, sj, dst + p * ld + j, ld);
    for (int64_t p = 0; p < (np + 1) / 2; p++) {
        const uint16_t *const low = src + 2 * p * sp;
        const int both = 2 * p + 1 < np;
        const int64_t j0 = p < turned ? cols : 0;
        if (both && sj == 1)
            join_pairs(low + j0, low + sp + j0, nj - j0, dst + p * ld + j0);
        else
            for (int64_t j = j0; j < nj; j++)
                dst[p * ld + j] = low[j * sj] | (both ? (uint32_t)low[j * sj + sp] << 16 : 0);
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
