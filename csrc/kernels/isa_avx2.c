/* isa_avx2.c: AVX2 with FMA and F16C (Haswell, Zen and later). */
#if defined(__x86_64__)
#include "pragma_x86.h"
PK_TARGET_BEGIN("avx2,fma,f16c,bmi,popcnt")
#include <immintrin.h>
#include "dtype.h"
#include "internal.h"

typedef __m256 vf;
typedef __m256d vd;
#define VFN 8
#define VDN 4
#define NV 2
#define DOT_M 2
#define ISA_TABLE pk_isa_avx2
#define ISA_NAME "avx2"
#define ISA_MATH 1
#define ISA_FEW 15, 15, 48, 48
#define WORDS_STEPS
#define WORDS_TURN
#define ISA_TAKES_HALVES
#define WORDS_BF16_ROW
#define WORDS_BF16_PAIRS bf16_pairs

static INLINE vf vf_load(const float *p) {
    return _mm256_loadu_ps(p);
}
static INLINE void vf_store(float *p, vf v) {
    _mm256_storeu_ps(p, v);
}
static INLINE vf vf_set1(float x) {
    return _mm256_set1_ps(x);
}
static INLINE vf vf_fma(vf a, vf b, vf c) {
    return _mm256_fmadd_ps(a, b, c);
}
static INLINE vf vf_add(vf a, vf b) {
    return _mm256_add_ps(a, b);
}
static INLINE vf vf_sub(vf a, vf b) {
    return _mm256_sub_ps(a, b);
}
static INLINE vf vf_mul(vf a, vf b) {
    return _mm256_mul_ps(a, b);
}
static INLINE float vf_sum(vf a) {
    __m128 q = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    q = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}
static INLINE __m128i halves(const void *p, int i) {
    return _mm_loadu_si128((const __m128i *)p + i);
}
static INLINE void steps16(const uint16_t *a, const uint16_t *b, int8_t *to) {
    const __m128i d = _mm_sub_epi16(halves(a, 0), halves(b, 0));
    _mm_storel_epi64((__m128i *)(void *)to, _mm_packs_epi16(d, d));
}
static INLINE void steps32(const float *a, const float *b, int8_t *to) {
    const __m128i low = _mm_sub_epi32(halves(a, 0), halves(b, 0)), high = _mm_sub_epi32(halves(a, 1), halves(b, 1));
    const __m128i d = _mm_packs_epi32(low, high);
    _mm_storel_epi64((__m128i *)(void *)to, _mm_packs_epi16(d, d));
}
static INLINE void vd_steps(const double *a, const double *b, int8_t *to) {
    for (int i = 0; i < VDN; i++) to[i] = step64(a + i, b + i);
}
static INLINE uint64_t mask64(const int8_t *p) {
    uint64_t mask = 0;
    for (int i = 0; i < 2; i++) {
        const __m256i v = _mm256_loadu_si256((const __m256i *)(const void *)p + i);
        mask |= (uint64_t)(uint32_t)_mm256_movemask_epi8(_mm256_cmpeq_epi8(v, _mm256_setzero_si256())) << 32 * i;
    }
    return ~mask;
}
/* Each lane turned left by 0 to 3 bytes: one shuffle for two shifts, of which as few can run at once. */
static INLINE __m256i lanes_turned(__m256i x, const int bytes) {
    static const int32_t first[] = {0x03020100, 0x02010003, 0x01000302,
                                    0x00030201}; /* of a lane: where its bytes are */
    const __m256i lane =
        _mm256_setr_epi32(0, 0x04040404, 0x08080808, 0x0c0c0c0c, 0, 0x04040404, 0x08080808, 0x0c0c0c0c);
    return bytes ? _mm256_shuffle_epi8(x, _mm256_add_epi32(lane, _mm256_set1_epi32(first[bytes]))) : x;
}
static INLINE vf vf_put_f32(float *p, vf v) {
    _mm256_storeu_ps(p, v);
    return v;
}
static INLINE vf vf_load_bf16(const uint16_t *p) {
    const __m128i h = _mm_loadu_si128((const __m128i *)(const void *)p);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}
/* 16 as they lie: those of even places, those of odd ones */
typedef struct {
    vf even, odd;
} bf16_pairs;
static INLINE bf16_pairs vf_load_pairs(const uint16_t *p) {
    const __m256i x = _mm256_loadu_si256((const __m256i *)(const void *)p), odd = _mm256_set1_epi32((int)0xffff0000u);
    const bf16_pairs pairs = {_mm256_castsi256_ps(_mm256_slli_epi32(x, 16)),
                              _mm256_castsi256_ps(_mm256_and_si256(x, odd))};
    return pairs;
}
static INLINE vf vf_dot_pairs(bf16_pairs a, bf16_pairs b, vf c) {
    return _mm256_fmadd_ps(a.odd, b.odd, _mm256_fmadd_ps(a.even, b.even, c));
}
/* in the lower halves of the lanes; not for NaNs with bits set in their own */
static INLINE __m256i bf16_rounded(vf v) {
    const __m256i u = _mm256_castps_si256(v), even = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    return _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), even), 16);
}
static INLINE __m256i bf16_bits(vf v) {
    const __m256i high = _mm256_srli_epi32(_mm256_castps_si256(v), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(bf16_rounded(v), _mm256_or_si256(high, _mm256_set1_epi32(0x40)), nan);
}
static INLINE vf vf_put_bf16(uint16_t *p, vf v) {
    const __m256i r = bf16_bits(v), packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(r, r), 0x08);
    _mm_storeu_si128((__m128i *)(void *)p, _mm256_castsi256_si128(packed));
    return _mm256_castsi256_ps(_mm256_slli_epi32(r, 16));
}
/* Rows of 16 in two vectors, 0..3 and 8..11, 4..7 and 12..15, as a vector of bits is unpacked. Half a unit of the last
 * place is added and the rest cut off, which is right but for NaNs and for what is in the middle of two values. */
typedef __m256i bf16_row_bits;
static INLINE void bf16_row_turn(vf *v) {
    const vf low = _mm256_permute2f128_ps(v[0], v[1], 0x20), high = _mm256_permute2f128_ps(v[0], v[1], 0x31);
    v[0] = low;
    v[1] = high;
}
static INLINE void bf16_row_load(const void *p, vf *v) {
    const __m256i x = _mm256_loadu_si256(p), zero = _mm256_setzero_si256();
    v[0] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(zero, x));
    v[1] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(zero, x));
}
static INLINE void bf16_row_store(void *p, __m256i x) {
    _mm256_storeu_si256(p, x);
}
/* odd: the least halves that were cut off, 0 for a NaN */
static INLINE __m256i bf16_row_start(void) {
    return _mm256_set1_epi32(-1);
}
static INLINE __m256i bf16_row_round(const vf *v, __m256i *odd) {
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v[0], v[1], _CMP_UNORD_Q)), half = _mm256_set1_epi32(0x8000);
    const __m256i low = _mm256_add_epi32(_mm256_castps_si256(v[0]), half);
    const __m256i high = _mm256_add_epi32(_mm256_castps_si256(v[1]), half);
    *odd = _mm256_andnot_si256(nan, _mm256_min_epu16(*odd, _mm256_min_epu16(low, high)));
    return _mm256_packus_epi32(_mm256_srli_epi32(low, 16), _mm256_srli_epi32(high, 16));
}
static INLINE int bf16_row_is_odd(__m256i odd) {
    return (_mm256_movemask_epi8(_mm256_cmpeq_epi16(odd, _mm256_setzero_si256())) & 0x33333333) != 0;
}
static INLINE vf vf_load_f16(const uint16_t *p) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)p));
}
static INLINE vf vf_put_f16(uint16_t *p, vf v) {
    const __m128i h = _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128((__m128i *)(void *)p, h);
    return _mm256_cvtph_ps(h);
}
static INLINE void vf_transpose(vf *b) {
    vf t[8], u[8];
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps(b[i], b[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(b[i], b[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const int at = (i & 1) + 4 * (i >> 1);
        u[2 * i] = _mm256_shuffle_ps(t[at], t[at + 2], 0x44);
        u[2 * i + 1] = _mm256_shuffle_ps(t[at], t[at + 2], 0xee);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        b[j] = _mm256_permute2f128_ps(u[j], u[j + 4], 0x20);
        b[j + 4] = _mm256_permute2f128_ps(u[j], u[j + 4], 0x31);
    }
}

static INLINE vd vd_load(const double *p) {
    return _mm256_loadu_pd(p);
}
static INLINE void vd_store(double *p, vd v) {
    _mm256_storeu_pd(p, v);
}
static INLINE vd vd_set1(double x) {
    return _mm256_set1_pd(x);
}
static INLINE vd vd_fma(vd a, vd b, vd c) {
    return _mm256_fmadd_pd(a, b, c);
}
static INLINE vd vd_add(vd a, vd b) {
    return _mm256_add_pd(a, b);
}
static INLINE vd vd_sub(vd a, vd b) {
    return _mm256_sub_pd(a, b);
}
static INLINE vd vd_mul(vd a, vd b) {
    return _mm256_mul_pd(a, b);
}
static INLINE double vd_sum(vd a) {
    const __m128d q = _mm_add_pd(_mm256_castpd256_pd128(a), _mm256_extractf128_pd(a, 1));
    return _mm_cvtsd_f64(_mm_add_sd(q, _mm_unpackhi_pd(q, q)));
}
static INLINE vd vd_put_f64(double *p, vd v) {
    _mm256_storeu_pd(p, v);
    return v;
}
static INLINE void vd_transpose(vd *b) {
    const vd t0 = _mm256_unpacklo_pd(b[0], b[1]), t1 = _mm256_unpackhi_pd(b[0], b[1]);
    const vd t2 = _mm256_unpacklo_pd(b[2], b[3]), t3 = _mm256_unpackhi_pd(b[2], b[3]);
    b[0] = _mm256_permute2f128_pd(t0, t2, 0x20);
    b[1] = _mm256_permute2f128_pd(t1, t3, 0x20);
    b[2] = _mm256_permute2f128_pd(t0, t2, 0x31);
    b[3] = _mm256_permute2f128_pd(t1, t3, 0x31);
}

#define ISA_TRACED "traced_avx2.inc"
#define ISA_SEGMENTS
#include "isa.inc"
PK_TARGET_END
#else
typedef int pk_no_avx2;
#endif
