/* kernels.h: the contract of the numeric kernels. Words live here; bodies are in *.inc, drivers in *.c.
 *
 * Below this line: no Python, no torch, no malloc, no locks, no static mutable state. The caller owns all memory,
 * passes a workspace (see the *_work functions) and, if it wants threads, a parallel-for. Every function may be called
 * from any thread at the same time on different data.
 *
 * Common to all of them
 * - dtypes: PK_F32, PK_F64, PK_BF16, PK_F16, any mix of them. Accumulation is in f32 (f64 if the matrix written, or x
 *   in a forward, is f64); each element written is rounded once (nearest even).
 * - matrices: any strides (transposed, stepped, zero strides for what is only read), any alignment of at least the
 *   element, any size including zero. A matrix that is written must not overlap itself or another operand.
 * - the same bits for every number of threads, every alignment and every stride; row i of pk_lowrank_* does not depend on
 *   the other rows. The ISAs with fused multiply-add (avx2, avx512, avx512bf16, neon) agree in the bits of merge, unmerge
 *   and switch, too, with one exception: avx512bf16 sums bf16 factors of one scale and rank >= 4 into a bf16 weight by
 *   the CPU's bf16 dot products. Generic differs in the last bits of the delta. A record knows how its delta was summed,
 *   and unmerge does it the same way if any ISA of the machine can.
 *   Contractions of bf16 x with bf16 factors (x A^T, g B) use these dot products as well: bf16 subnormals count as zero. So
 *   do, where x, the factors and the result are bf16, the products with what came of them (H B^T, u A, u^T x, g^T t), for
 *   up to 128 ranks the first two; H, u and t are rounded to bf16 for it, as torch rounds them.
 * - workspace: `work` needs no alignment and no initial content. A size of 0 means that NULL will do.
 */
#ifndef PEFT_C_KERNELS_H
#define PEFT_C_KERNELS_H

#include <stddef.h>
#include <stdint.h>

typedef enum { PK_F32 = 0, PK_F64 = 1, PK_BF16 = 2, PK_F16 = 3, PK_NDTYPES = 4 } pk_dtype;

/* A view: element (i, j) lies at data + (i * rs + j * cs) * pk_dtype_size(dtype). rs, cs in elements, may be < 0. */
typedef struct {
    void *data;
    int64_t rows, cols, rs, cs;
    pk_dtype dtype;
} pk_mat;

/* One adapter: delta = scale * up @ down, down = A (r, k), up = B (n, r). r may be 0. */
typedef struct {
    pk_mat down, up;
    double scale;
} pk_lowrank;

/* Runs fn over [begin, end) in pieces of at least `grain`, from any threads, and returns when all are done: torch's
 * torch_parallel_for has this type. NULL: serial. Returns 0, or nonzero if it could not run all (-> PK_EPARALLEL). */
typedef void (*pk_range_fn)(int64_t begin, int64_t end, void *ctx);
typedef int32_t (*pk_parallel_fn)(int64_t begin, int64_t end, int64_t grain, pk_range_fn fn, void *ctx);

typedef enum {
    PK_OK = 0,
    PK_NONFINITE = 1,   /* PK_CHECK: a result is inf or NaN; the weight has its old bits again */
    PK_CHANGED = 2,     /* unmerge, switch: done, but some of the weight was written by others since: there (and only
                         there) the delta was subtracted plainly */
    PK_FULL_RECORD = 3, /* the record's capacity was not enough; the weight has its old bits again */
    PK_EINVAL = -1,     /* shapes do not fit, unknown dtype, NULL data with elements: nothing was touched */
    PK_EPARALLEL = -2   /* the parallel-for failed: the matrices written are unspecified */
} pk_status;

/* ---------------------------------------------------------------------------------------------- low-rank forward */

/* y (m, n) += sum_i scale_i (x A_i^T) B_i^T        x (m, k), A_i (r_i, k), B_i (n, r_i), R = sum r_i
 * t: NULL, or (m, R): receives x A^T (unscaled, all factors side by side) for the backward.
 * y must not overlap x. */
size_t pk_lowrank_apply_work(const pk_mat *y, const pk_mat *x, const pk_lowrank *f, int nf);
int pk_lowrank_apply(const pk_mat *y, const pk_mat *x, const pk_lowrank *f, int nf, const pk_mat *t, void *work,
                     pk_parallel_fn par);
/* y = the terms: what was in it does not matter; the same workspace */
int pk_lowrank_set(const pk_mat *y, const pk_mat *x, const pk_lowrank *f, int nf, const pk_mat *t, void *work,
                   pk_parallel_fn par);

/* y (m, n) += sum_i scale_i H_i B_i^T, where row j of H_i (m, r_i) is the column ids[j] of A_i (r_i, k_i), each inside: what
 * adapters of an embedding add to its output. Accumulates in f64 if y is f64. Row j does not depend on the others. */
size_t pk_lookup_apply_work(const pk_mat *y, const pk_lowrank *f, int nf);
int pk_lookup_apply(const pk_mat *y, const int64_t *ids, const pk_lowrank *f, int nf, void *work, pk_parallel_fn par);

/* As the first with a linear layer below: y (m, n) = x w^T + bias + the terms, rounded once; w (n, k), bias (1, n): NULL
 * for none; no f64. With w and the factors transposed it is the gradient of such a layer's input. w is read once for
 * every LINEAR_ROWS or PACKED_ROWS rows (lowrank.h). A row depends on how many there are, but not on what is in the
 * others. The two that end in _suits: 1 where that is faster than what torch does for x and w of dtype. */
int pk_linear_suits(pk_dtype dtype, int64_t m, int64_t n, int64_t k);
int pk_linear_grad_suits(pk_dtype dtype, int64_t m, int64_t n, int64_t k);
size_t pk_linear_work(const pk_mat *y, const pk_mat *x, const pk_mat *w, const pk_lowrank *f, int nf);
int pk_linear(const pk_mat *y, const pk_mat *x, const pk_mat *w, const pk_mat *bias, const pk_lowrank *f, int nf,
              const pk_mat *t, void *work, pk_parallel_fn par);

/* The products of one factor's backward; every output with data == NULL is left out.
 *   u = g B                     (m, r): given, or with data == NULL computed, as it is for dx
 *   dx (m, k) += scale * u A    dx_add = 1: added to what is there; 0: written
 *   dA (r, k)  = scale * u^T x  x needed
 *   dB (n, r)  = scale * g^T t  t needed, or x to recompute it (t.data == NULL) */
typedef struct {
    pk_mat g, x, t, u; /* (m, n), (m, k), (m, r), (m, r) */
    pk_lowrank factor; /* A (r, k), B (n, r), scale */
    pk_mat dx, da, db; /* (m, k), (r, k), (n, r) */
    int dx_add;
} pk_backward;
size_t pk_lowrank_backward_work(const pk_backward *q);
int pk_lowrank_backward(const pk_backward *q, void *work, pk_parallel_fn par);

/* ----------------------------------------------------------------------------------------- merge, unmerge, switch */

/* What a merge does to w (n, k):
 *   PK_LOWRANK  w + alpha * sum_i scale_i B_i A_i     all ranks in one pass over w, B A is never built
 *   PK_DELTA    w + alpha * full                      full (n, k), any dtype and strides */
typedef enum { PK_LOWRANK = 0, PK_DELTA = 1 } pk_law;
typedef struct {
    pk_law law;
    const pk_lowrank *factors;
    int nf;
    pk_mat full;
    double alpha; /* usually 1 or -1 */
} pk_delta;

/* What exact unmerge needs beside the delta itself: for each weight that round(w' - delta) gets wrong, the difference;
 * a hash of the merged bits of every block. One flat block of bytes: copy, pickle or move it as you like, also to
 * another thread count or ISA. The caller allocates `capacity` bytes at data (no alignment needed), merge sets `size`;
 * the rest can be given back (realloc). With capacity >= pk_record_bound() it never overflows: a block whose record
 * would be larger than a copy of it is copied. Typical: 2-5 % of the weight's bytes; a large malloc commits only that.
 * A record belongs to one (weight, delta): keep a snapshot of the factors (or full) and alpha with it, and undo
 * merges in the reverse order. size < 1.2 % of the weight's bytes + 64 when nothing differs (f32: 0.6 %). */
typedef struct {
    void *data;
    size_t capacity, size;
} pk_record;

size_t pk_record_bound(const pk_mat *w);

enum {
    PK_CHECK = 1 /* fail with PK_NONFINITE if any element of the result is inf or NaN (in the same pass; without a
                    record a read-only pass comes first, at about twice the time) */
};

/* work for any of the three; pass NULL for the delta that is not there */
size_t pk_merge_work(const pk_mat *w, const pk_delta *old, const pk_delta *new_);

/* record: NULL = none. Without a record w' = round(w + delta); with one the same bits. */
int pk_merge(const pk_mat *w, const pk_delta *d, unsigned flags, pk_record *record, void *work, pk_parallel_fn par);

/* record: from pk_merge with a delta of the same bits -> the old bits exactly (NaN, inf, -0 included); NULL -> round(w
 * - delta), PK_OK. PK_CHANGED also if the record does not fit this weight's size or this machine's arithmetic: then all
 * of it is subtracted plainly. */
int pk_unmerge(const pk_mat *w, const pk_delta *d, const pk_record *record, void *work, pk_parallel_fn par);

/* unmerge(old, old_record) then merge(new_, flags, record) in one pass over w; the same bits, the same new record.
 * With PK_CHECK, or a new record smaller than the bound, a read-only pass comes first, so that a failure leaves w
 * merged as it was. old_record is not written: drop it after PK_OK or PK_CHANGED. */
int pk_switch(const pk_mat *w, const pk_delta *old, const pk_record *old_record, const pk_delta *new_, unsigned flags,
              pk_record *record, void *work, pk_parallel_fn par);

/* ------------------------------------------------------------------------------------ replacing a weight as a whole */

/* Arrays of n elements that change places: `other`, and w or, with `places`, those elements of w, all different, which
 * has `size` of them (PK_EINVAL if one is not inside). */
typedef struct {
    pk_dtype dtype;
    void *w, *other;
    int64_t n, size;
    const void *places; /* n of int64_t or, with `narrow`, int32_t */
    int narrow;
    uint32_t *hashes; /* NULL, or one for each of pk_exchange_blocks of the new w */
} pk_pair;

/* What w becomes instead of `other`: round(w + v), or w * v, where v of element i is values[i / run % count]. `values`
 * may be pair.other, if they are n; f64 goes with f64 only. */
typedef struct {
    const void *values;
    pk_dtype dtype;
    int64_t run, count;
    int multiply;
} pk_operand;

/* by: NULL to exchange w with other; else other gets what w was, whatever is in it: it may be NULL without PK_CHECK and
 * with a run of 1. digest: that of the new w; NULL if it is not asked for. With PK_CHECK and a result that is not
 * finite: PK_NONFINITE, w has its old bits again, and other holds what was not wanted. */
int pk_exchange(const pk_pair *pair, const pk_operand *by, unsigned flags, uint64_t *digest, pk_parallel_fn par);

/* The exchange for an old w of this digest; PK_CHANGED: it has another one, and nothing has changed. */
int pk_exchange_back(const pk_pair *pair, uint64_t digest, pk_parallel_fn par);

/* w = other, where w has the hashes of combining `other` by `by`; PK_CHANGED: it has not, and nothing has changed. `done`
 * has pk_exchange_blocks bytes. */
size_t pk_exchange_blocks(const pk_pair *pair);
int pk_uncombine(const pk_pair *pair, const pk_operand *by, unsigned char *done, pk_parallel_fn par);

/* A digest of n elements' bits, the same on every machine and for every number of threads. */
int pk_digest(pk_dtype dtype, const void *w, int64_t n, uint64_t *digest, pk_parallel_fn par);

/* ------------------------------------------------------------------------------------------------------ small words */

/* 1: all elements finite, 0: not, PK_EINVAL. */
int pk_finite(const pk_mat *a, pk_parallel_fn par);

int64_t pk_dtype_size(pk_dtype dtype);

/* ISAs, best first: pk_isa_list(i) for i = 0, 1, ... gives the names that this machine can run, then NULL. pk_isa_name
 * is the one in use: the best, or what pk_isa_select chose (0; -1 unknown or not available: nothing changes). Select is
 * for start-up and tests, not while kernels run; the caller reads PEFT_C_ISA and passes it on.
 * Names: avx512bf16, avx512, avx2 (x86-64), neon (AArch64), generic. */
const char *pk_isa_list(int i);
const char *pk_isa_name(void);
int pk_isa_select(const char *name);

#endif
