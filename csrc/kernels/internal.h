/* internal.h: what the drivers (merge.c, lowrank.c, matrix.c, record.c) and the ISA files say to each other.
 *
 * "acc" is the accumulation type: float, or double where index 1 is used (PK_F64). A dtype's own acc is double for
 * PK_F64 and float for the others; rows of another acc are converted one element at a time by matrix.c. */
#ifndef PEFT_C_KERNELS_INTERNAL_H
#define PEFT_C_KERNELS_INTERNAL_H

#include "kernels.h"

#define INLINE inline __attribute__((always_inline))

enum {
    MR = 6,          /* rows of the micro-tile */
    NR_MAX = 64,     /* widest panel of any ISA, and what layouts are padded to */
    UNIT_COLS = 512, /* a unit: at most UNIT_COLS columns and UNIT_SIZE elements (padded) of a weight */
    UNIT_SIZE = MR * UNIT_COLS,
    SEGMENT = 64, /* elements of a row that are coded and hashed together */
    DEPTH = 128   /* longest panel kept on a stack */
};

/* the hash of bits (hash.inc) */
enum { HASH_LINES = 4, HASH_TURN = 15 };
#define HASH_FACTOR 0x9e3779b5u

typedef enum { OP_ADD, OP_SUB, OP_MUL, OP_SET } row_op;

/* A row of tiles, nr columns wide, of a weight and its delta(i, j) = sum_p row[p * ldrow + i] panel[p * nr + j] (with
 * pairs: see pk_isa.pairs), i < mr; the panel of the next tile comes `depth` rows of the panel further on.
 * next: NULL, or where the walk will be at the first tile's place later. */
typedef struct {
    int64_t depth, ldrow, ldw, cols;
    const void *row, *panel, *next;
    void *w;
    float scale; /* of pairs */
    int mr;
} pk_strip;

/* Where one stands in the code of a unit (record.h), which is written or read segment by segment, and the hash of the
 * merged bits of these. */
typedef struct {
    unsigned char *code;        /* goes up */
    unsigned char *wide;        /* goes down */
    const unsigned char *start; /* of both: what is read from below is 0 */
    uint32_t hash[16];
    int bad; /* inf or NaN, or sums that overflow: look closer */
} pk_trace;

/* Kernels of one dtype S; n elements, contiguous unless strides are given. */
typedef struct {
    /* dst[p * ld + j] = scale * src[p * sp + j * sj], p < np, j < nj: S -> acc */
    void (*pack)(const void *src, int64_t sp, int64_t sj, int64_t np, int64_t nj, void *dst, int64_t ld, double scale);
    /* out = round(w op d); out may be w. OP_SET ignores w. */
    void (*apply)(row_op op, const void *w, const void *d, void *out, int64_t n);
    /* old = w, w = round(w op d), op is OP_ADD or OP_MUL; step 0: d[0] for all. hash: NULL, or it goes on by what w
     * becomes, HASH_LINES whole lines or several times so many. */
    void (*keep)(row_op op, void *w, const void *d, int step, void *old, int64_t n, uint32_t *hash);
    /* w(i, j) = round(w op delta(i, j)) for whole tiles, delta of acc ([0]) or of pairs of bf16 ([1], NULL if the ISA has
     * none); op is OP_ADD, OP_SUB or OP_SET. */
    void (*fused[2])(row_op op, const pk_strip *s);
    /* A segment, n <= SEGMENT, d of SEGMENT with zeros from n on: w = round(w + d), coded; and back: w = round(w - d)
     * corrected by the code. Both hash the merged bits. */
    void (*record)(void *w, const void *d, int64_t n, pk_trace *t);
    void (*restore)(void *w, const void *d, int64_t n, pk_trace *t);
    /* NULL, or the same for w + delta and w - delta of a strip of MR rows and whole segments, one after the other down the
     * rows, then across. */
    void (*traced[2])(int restore, const pk_strip *s, pk_trace *t);
    /* t[i * ldt + j] = sum_k x[i * ldx + k] a[j * lda + k], i < m, j < r; a is S ([0]) or acc ([1]), t is acc. The bits of
     * [0] and [1] are the same unless the ISA multiplies pairs (pk_isa.dots_in_pairs, for bf16) */
    void (*dot[2])(const void *x, int64_t ldx, int64_t m, const void *a, int64_t lda, int64_t r, int64_t k, void *t,
                   int64_t ldt);
    /* 1 if all finite */
    int (*finite)(const void *a, int64_t n);
} pk_row_kernels;

typedef struct {
    const char *name;
    int math;            /* how a delta is summed: MATH_PLAIN multiply, then add; MATH_FUSED (MATH_PAIRS: see pairs) */
    int nr[2];           /* panel width for float, double acc */
    int takes_halves;    /* where it is the best of the machine, torch has no fast products of bf16 and f16 */
    int dots_in_pairs;   /* dot of bf16 with bf16 sums in another order than of f32 */
    int few[PK_NDTYPES]; /* by dtype: up to how many rows dot takes less time than packing and tile or pairs */
    /* d[i * ldd + j] = sum_p row[p * ldrow + i] panel[p * nr + j], i < mr (1..MR), j < nr: acc. add: 0; 1, the sum goes
     * on from d; 2, it is added to d. */
    void (*tile[2])(int64_t depth, const void *row, int64_t ldrow, const void *panel, void *d, int64_t ldd, int mr,
                    int add);
    /* NULL, or the same for pairs of bf16: scale times the sum over both halves of row[p * sp + i * si] panel[p * nr + j] is
     * written to d, or with `add` added to it. And their packing: dst[p * ld + j] = src[2 p * sp + j * sj] and, unless
     * 2 p + 1 == np, the next in p above it, 2 p < np, j < nj. */
    void (*pairs)(int64_t depth, const uint32_t *row, int64_t sp, int64_t si, const uint32_t *panel, float *d,
                  int64_t ldd, float scale, int mr, int add);
    void (*pack_pairs)(const uint16_t *src, int64_t sp, int64_t sj, int64_t np, int64_t nj, uint32_t *dst, int64_t ld);
    /* goes on with the hash by so many bytes, a multiple of 64 */
    void (*hash)(uint32_t *state, const void *p, int64_t bytes);
    pk_row_kernels dtype[PK_NDTYPES];
} pk_isa;

/* pick.c */
int pk_cpu_is_measured(void); /* of the make that limits in time were measured on */
const pk_isa *pk_isa_now(void);
enum { MATH_PLAIN = 0, MATH_FUSED = 1, MATH_PAIRS = 2 };
const pk_isa *pk_isa_with_math(int math); /* the one in use if it has it, else another, else NULL */

extern const pk_isa pk_isa_generic;
#if defined(__x86_64__)
extern const pk_isa pk_isa_avx2, pk_isa_avx512, pk_isa_avx512bf16;
#elif defined(__aarch64__)
extern const pk_isa pk_isa_neon;
#endif

/* record.c. The hash that a trace starts with: as long as it has no code, read from here, not from hash, what has just
 * been written in other pieces and would be waited for. */
extern const uint32_t trace_first[16];

/* For each mask of 8 bits, 8 places of bytes, as pshufb takes them: of the bytes where it is 1, side by side; and, to get
 * them from there, for each bit its byte's place, or 0x80 (a zero) where it is 0. */
extern const uint64_t trace_gather[256], trace_spread[256];

/* The code of a segment: old bits - bits got back, steps are these differences saturated, mask says where
 * they are not 0. Getting: adds them, times sign, to the first n of the bits. */
void trace_put(pk_trace *t, uint64_t mask, const int8_t *steps, const void *old, const void *back, int64_t size);
void trace_get(pk_trace *t, void *bits, int64_t n, int64_t size, int sign);

/* matrix.c */
static inline int64_t round_up(int64_t v, int64_t step) {
    return (v + step - 1) / step * step;
}
static inline int64_t min64(int64_t a, int64_t b) {
    return a < b ? a : b;
}
static inline int64_t max64(int64_t a, int64_t b) {
    return a > b ? a : b;
}
static inline int64_t acc_size(int wide) {
    return wide ? 8 : 4;
}
static inline char *mat_at(const pk_mat *a, int64_t i, int64_t j) {
    return (char *)a->data + (i * a->rs + j * a->cs) * pk_dtype_size(a->dtype);
}
static inline pk_mat mat_transposed(pk_mat a) {
    const pk_mat t = {a.data, a.cols, a.rows, a.cs, a.rs, a.dtype};
    return t;
}
static inline pk_mat mat_rows(pk_mat a, int64_t i, int64_t n) {
    if (a.data) a.data = mat_at(&a, i, 0);
    a.rows = n;
    return a;
}
int mat_valid(const pk_mat *a); /* known dtype, sizes >= 0, data unless empty */
/* dst[p * ld + j] = scale * a(p0 + p, j0 + j) as acc, p < np, j < nj */
void mat_pack(const pk_isa *isa, const pk_mat *a, int64_t p0, int64_t j0, int64_t np, int64_t nj, void *dst,
              int64_t ld, double scale, int wide);
/* a(p0 + p, j0 + j) = scale * src[p * ld + j], acc -> dtype */
void mat_unpack(const pk_isa *isa, const pk_mat *a, int64_t p0, int64_t j0, int64_t np, int64_t nj, const void *src,
                int64_t ld, double scale, int wide);
/* Towards the cache: the g-th of n shares of a(p0.., j0..), at most np x nj elements; a has a stride of 1. */
void mat_fetch(const pk_mat *a, int64_t p0, int64_t np, int64_t j0, int64_t nj, int64_t g, int64_t n);
/* raw bits, contiguous rows <-> strided columns */
void bits_gather(const pk_mat *a, int64_t i, int64_t j, int64_t n, void *dst);
void bits_scatter(const pk_mat *a, int64_t i, int64_t j, int64_t n, const void *src);

/* par or serial; work = estimated cycles of one index. 0, or PK_EPARALLEL. */
int run_parallel(pk_parallel_fn par, int64_t n, int64_t work, pk_range_fn fn, void *ctx);

/* A stack over the caller's workspace; with base NULL it only counts. Put used back to free what came after. */
typedef struct {
    char *base;
    size_t used, peak;
} work_area;
static inline work_area work_start(void *work) {
    static char nothing[64]; /* NULL is for counting; no bytes are ever taken from this */
    const work_area a = {work ? (char *)(((uintptr_t)work + 63u) & ~(uintptr_t)63u) : nothing, 0, 0};
    return a;
}
static inline void *work_take(work_area *a, int64_t bytes) {
    char *const p = a->base ? a->base + a->used : NULL;
    a->used += (size_t)round_up(bytes, 64);
    if (a->used > a->peak) a->peak = a->used;
    return p;
}
static inline size_t work_total(const work_area *a) {
    return a->peak ? a->peak + 64 : 0;
}

#endif
