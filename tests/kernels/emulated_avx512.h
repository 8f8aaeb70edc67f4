/* emulated_avx512.h: AVX-512 on CPUs that have AVX2: SIMDe (https://github.com/simd-everywhere/simde) under the names of
 * immintrin.h, and here what Debian's release of it lacks. To be included before the kernels' own files, compiled for AVX2. */
#ifndef PEFT_C_EMULATED_AVX512_H
#define PEFT_C_EMULATED_AVX512_H

#include <immintrin.h>
#include <string.h>

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#undef _mm_prefetch

/* pragma_x86.h: whatever a file asks for, it gets AVX2 */
#define PEFT_C_KERNELS_PRAGMA_X86_H
#define PK_TARGET_BEGIN(target)
#define PK_TARGET_END

#define EMULATED static inline __attribute__((always_inline))
#define BYTES 64

#undef _kor_mask16
#define _kor_mask16(a, b) ((__mmask16)((a) | (b)))

/* sixteen integers of one type as another: its lower bits, or more */
#define EMULATED_CONVERT(name, of, of_vector, as, as_vector) \
    EMULATED as_vector emulated_##name(of_vector x) { \
        of from[16]; \
        as to[16]; \
        as_vector result; \
        memcpy(from, &x, sizeof from); \
        for (int i = 0; i < 16; i++) to[i] = (as)from[i]; \
        memcpy(&result, to, sizeof result); \
        return result; \
    }
EMULATED_CONVERT(cvtepi8_epi32, int8_t, __m128i, int32_t, __m512i)
EMULATED_CONVERT(cvtepu16_epi32, uint16_t, __m256i, uint32_t, __m512i)
EMULATED_CONVERT(cvtepi32_epi16, uint32_t, __m512i, uint16_t, __m256i)
#define _mm512_cvtepi8_epi32 emulated_cvtepi8_epi32
#define _mm512_cvtepu16_epi32 emulated_cvtepu16_epi32
#define _mm512_cvtepi32_epi16 emulated_cvtepi32_epi16

EMULATED __mmask32 emulated_cmplt_epi16_mask(__m512i x, __m512i y) {
    int16_t a[32], b[32];
    memcpy(a, &x, sizeof a);
    memcpy(b, &y, sizeof b);
    uint32_t mask = 0;
    for (int i = 0; i < 32; i++) mask |= (uint32_t)(a[i] < b[i]) << i;
    return mask;
}
#define _mm512_cmplt_epi16_mask emulated_cmplt_epi16_mask

#define _mm512_testn_epi16_mask(x, y) (~_mm512_test_epi16_mask(x, y))

EMULATED __m256 emulated_extractf32x8_ps(__m512 x, int half) {
    __m256 halves[2];
    memcpy(halves, &x, sizeof halves);
    return halves[half];
}
#define _mm512_extractf32x8_ps emulated_extractf32x8_ps

/* order: two bits for each quarter of the result, the first two of x, the others of y */
EMULATED __m512 emulated_shuffle_f32x4(__m512 x, __m512 y, int order) {
    __m128 a[4], b[4], to[4];
    memcpy(a, &x, sizeof a);
    memcpy(b, &y, sizeof b);
    for (int i = 0; i < 4; i++, order >>= 2) to[i] = (i < 2 ? a : b)[order & 3];
    __m512 result;
    memcpy(&result, to, sizeof result);
    return result;
}
#define _mm512_shuffle_f32x4 emulated_shuffle_f32x4
#define _mm512_shuffle_f64x2(x, y, order) \
    _mm512_castps_pd(emulated_shuffle_f32x4(_mm512_castpd_ps(x), _mm512_castpd_ps(y), order))

EMULATED __m512 emulated_cvtph_ps(__m256i x) {
    const __m256 halves[2] = {_mm256_cvtph_ps(_mm256_castsi256_si128(x)),
                              _mm256_cvtph_ps(_mm256_extracti128_si256(x, 1))};
    __m512 result;
    memcpy(&result, halves, sizeof result);
    return result;
}
#define _mm512_cvtph_ps emulated_cvtph_ps

EMULATED __m256i emulated_cvtps_ph(__m512 x, const int rounding) {
    __m256 halves[2];
    memcpy(halves, &x, sizeof halves);
    (void)rounding; /* to nearest even, everywhere */
    return _mm256_set_m128i(_mm256_cvtps_ph(halves[1], _MM_FROUND_TO_NEAREST_INT),
                            _mm256_cvtps_ph(halves[0], _MM_FROUND_TO_NEAREST_INT));
}
#define _mm512_cvtps_ph emulated_cvtps_ph

EMULATED void emulated_mask_storeu_ps(float *to, __mmask16 mask, __m512 x) {
    float from[16];
    memcpy(from, &x, sizeof from);
    for (int i = 0; i < 16; i++)
        if (mask >> i & 1) to[i] = from[i];
}
#define _mm512_mask_storeu_ps emulated_mask_storeu_ps

EMULATED __m512i emulated_compress_epi8(__mmask64 mask, __m512i x) {
    int8_t from[BYTES], to[BYTES] = {0};
    memcpy(from, &x, sizeof from);
    int n = 0;
    for (int i = 0; i < BYTES; i++)
        if (mask >> i & 1) to[n++] = from[i];
    return simde_mm512_loadu_si512(to);
}
#define _mm512_maskz_compress_epi8 emulated_compress_epi8

EMULATED __m512i emulated_expand_epi8(__mmask64 mask, __m512i x) {
    int8_t from[BYTES], to[BYTES] = {0};
    memcpy(from, &x, sizeof from);
    int n = 0;
    for (int i = 0; i < BYTES; i++)
        if (mask >> i & 1) to[i] = from[n++];
    return simde_mm512_loadu_si512(to);
}
#define _mm512_maskz_expand_epi8 emulated_expand_epi8

/* subnormals only: all that the kernels ask for */
EMULATED __mmask16 emulated_fpclass_ps_mask(__m512 x, const int classes) {
    uint32_t bits[16], mask = 0;
    memcpy(bits, &x, sizeof bits);
    (void)classes; /* 0x20 */
    for (int i = 0; i < 16; i++) mask |= (uint32_t)((bits[i] & 0x7f800000u) == 0 && (bits[i] & 0x7fffffu) != 0) << i;
    return (__mmask16)mask;
}
#define _mm512_fpclass_ps_mask emulated_fpclass_ps_mask

/* as the instruction does: subnormals become zeros, NaNs quiet */
EMULATED uint16_t emulated_bf16(uint32_t x) {
    if ((x & 0x7f800000u) == 0) return (uint16_t)((x & 0x80000000u) >> 16);
    if ((x & 0x7fffffffu) > 0x7f800000u) return (uint16_t)(x >> 16 | 0x40u);
    return (uint16_t)((x + 0x7fffu + (x >> 16 & 1u)) >> 16);
}

EMULATED __m256i emulated_cvtneps_pbh(__m512 x) {
    uint32_t from[16];
    uint16_t to[16];
    memcpy(from, &x, sizeof from);
    for (int i = 0; i < 16; i++) to[i] = emulated_bf16(from[i]);
    return _mm256_loadu_si256((const __m256i *)(const void *)to);
}
#define _mm512_cvtneps_pbh emulated_cvtneps_pbh

EMULATED __m512i emulated_cvtne2ps_pbh(__m512 high, __m512 low) {
    const __m256i halves[2] = {emulated_cvtneps_pbh(low), emulated_cvtneps_pbh(high)};
    return simde_mm512_loadu_si512(halves);
}
#define _mm512_cvtne2ps_pbh emulated_cvtne2ps_pbh

#define __asm__(...) /* strip_kept of traced_avx512.inc, which keeps a register of 64 bytes */

#endif
