/* exchange.c: the elements of two arrays change places, block by block; the digest of an array. */
#include <stdatomic.h>
#include <string.h>

#include "record.h"

enum {
    PIECE = 1024,      /* elements that are worked on at once: few enough to stay in the L1 cache */
    BLOCK = 4 * PIECE, /* elements that are hashed together: few enough to stay in the L2 cache */
    SPARSE = 256,      /* the same for elements that each have a cache line of their own */
};

typedef struct {
    const pk_isa *isa;
    pk_pair pair; /* other NULL: nothing is kept; without `by`, only the digest */
    const pk_operand *by;
    int check, hash, old; /* old: the digest is of what w was, not of what it becomes */
    unsigned char *done;  /* blocks that pk_uncombine has restored */
    _Atomic uint64_t digest;
    atomic_int bad;
} exchange_job;

/* Operands as they are computed with: PIECE from one on, or all that are left. */
typedef struct {
    int64_t first, n;
    _Alignas(64) char wide[PIECE * 8];
} operand_window;

/* The operands from the i-th on. */
static const char *operands_from(const exchange_job *job, operand_window *window, int64_t i) {
    const pk_operand *const by = job->by;
    const int64_t wide = acc_size(job->pair.dtype == PK_F64);
    if (i < window->first || i >= window->first + window->n) {
        window->first = i;
        window->n = min64(PIECE, by->count - i);
        job->isa->dtype[by->dtype].pack((const char *)by->values + i * pk_dtype_size(by->dtype), 0, 1, 1, window->n,
                                        window->wide, PIECE, 1.0);
    }
    return window->wide + (i - window->first) * wide;
}

/* Whether n elements consist of whole groups of lines in each part with operands of its own, which are hashed at once. */
static int is_grouped(const exchange_job *job, int64_t n) {
    const int64_t period = job->by->run == 1 ? job->by->count : job->by->run;
    const int64_t group = HASH_LINES * 64 / pk_dtype_size(job->pair.dtype);
    return n % group == 0 && period % group == 0;
}

/* other = w, w = w op operand; hash: NULL, or it goes on by the new w */
static void combine_piece(const exchange_job *job, operand_window *window, int64_t at, char *w, char *other, int64_t n,
                          uint32_t *hash) {
    const pk_row_kernels *const rows = &job->isa->dtype[job->pair.dtype];
    const row_op op = job->by->multiply ? OP_MUL : OP_ADD;
    const int64_t size = pk_dtype_size(job->pair.dtype), run = job->by->run;
    for (int64_t part, j = 0; j < n; j += part) {
        const int64_t i = (at + j) / run % job->by->count;
        const char *const by = operands_from(job, window, i);
        part = min64(n - j, run == 1 ? window->first + window->n - i : run - (at + j) % run);
        if (other)
            rows->keep(op, w + j * size, by, run == 1, other + j * size, part, hash);
        else
            rows->apply(op, w + j * size, by, w + j * size, part);
    }
}

static void exchange_piece(exchange_job *job, operand_window *window, int64_t at, char *w, char *other, int64_t n,
                           uint32_t *hash) {
    const size_t bytes = (size_t)(n * pk_dtype_size(job->pair.dtype));
    if (job->by) {
        combine_piece(job, window, at, w, other, n, hash);
    } else {
        char fresh[PIECE * 8]; /* one array after the other: going through both at once is slower */
        memcpy(fresh, other, bytes);
        memcpy(other, w, bytes);
        memcpy(w, fresh, bytes);
    }
    if (job->check && !job->isa->dtype[job->pair.dtype].finite(w, n))
        atomic_store_explicit(&job->bad, 1, memory_order_relaxed);
}

/* p, n elements, is what w has at the places i, or, with `back`, becomes that. */
#define COPY(type, index) \
    static void copy_##type##_##index(type *w, const index *i, type *p, int64_t n, int back) { \
        for (int64_t j = 0; !back && j < n; j++) p[j] = w[i[j]]; \
        for (int64_t j = 0; back && j < n; j++) w[i[j]] = p[j]; \
    }
COPY(uint16_t, int32_t)
COPY(uint32_t, int32_t)
COPY(uint64_t, int32_t)
COPY(uint16_t, int64_t)
COPY(uint32_t, int64_t)
COPY(uint64_t, int64_t)
#undef COPY

/* Between w and `piece`, which holds n of its elements: those at the places from `at` on. */
static void places_copy(const pk_pair *pair, int64_t at, void *piece, int64_t n, int back) {
    const int32_t *const narrow = pair->narrow ? (const int32_t *)pair->places + at : NULL;
    const int64_t *const wide = (const int64_t *)pair->places + at;
#define COPY(type) \
    (narrow ? copy_##type##_int32_t(pair->w, narrow, piece, n, back) \
            : copy_##type##_int64_t(pair->w, wide, piece, n, back))
    switch (pk_dtype_size(pair->dtype)) {
    case 2:
        COPY(uint16_t);
        break;
    case 4:
        COPY(uint32_t);
        break;
    default:
        COPY(uint64_t);
    }
#undef COPY
}

static void hash_piece(const pk_isa *isa, uint32_t *hash, const char *p, int64_t bytes) {
    const int64_t whole = bytes / 64 * 64;
    _Alignas(64) char rest[64] = {0};
    isa->hash(hash, p, whole);
    if (whole == bytes) return;
    memcpy(rest, p + whole, (size_t)(bytes - whole));
    isa->hash(hash, rest, 64);
}

static void exchange_range(int64_t begin, int64_t end, void *ctx) {
    exchange_job *const job = ctx;
    const pk_pair *const pair = &job->pair;
    const int64_t size = pk_dtype_size(pair->dtype), piece = pair->places ? SPARSE : PIECE;
    operand_window window;
    uint64_t digest = 0;
    window.first = window.n = 0;
    for (int64_t i = begin; i < end; i++) {
        const int64_t stop = min64(pair->n, (i + 1) * BLOCK);
        pk_trace hash;
        trace_start(&hash, NULL, NULL);
        for (int64_t at = i * BLOCK; at < stop; at += piece) {
            _Alignas(64) char gathered[PIECE * 8];
            const int64_t n = min64(piece, stop - at);
            char *const w = pair->places ? gathered : (char *)pair->w + at * size;
            char *const other = pair->other ? (char *)pair->other + at * size : NULL;
            if (pair->places) places_copy(pair, at, gathered, n, 0);
            const int at_once = job->hash && job->by && other && is_grouped(job, n);
            if (other || job->by) exchange_piece(job, &window, at, w, other, n, at_once ? hash.hash : NULL);
            if (pair->places) places_copy(pair, at, gathered, n, 1);
            if (job->hash && !at_once) hash_piece(job->isa, hash.hash, job->old ? other : w, n * size);
        }
        digest += ((uint64_t)trace_hash(&hash) + 1) * (2 * (uint64_t)i + 1);
        if (pair->hashes) pair->hashes[i] = trace_hash(&hash);
    }
    atomic_fetch_add_explicit(&job->digest, digest, memory_order_relaxed);
}

/* Whether all places are in w: no sign in any, nor in what is left to the last one. */
static int places_valid(const pk_pair *pair) {
    const int64_t last = pair->size - 1;
    uint64_t signs = 0;
    if (pair->narrow) {
        uint32_t narrow = 0, limit = (uint32_t)min64(last, INT32_MAX);
        for (int64_t i = 0; i < pair->n; i++) {
            const uint32_t place = ((const uint32_t *)pair->places)[i];
            narrow |= place | (limit - place);
        }
        return narrow <= INT32_MAX;
    }
    for (int64_t i = 0; i < pair->n; i++) {
        const uint64_t place = ((const uint64_t *)pair->places)[i];
        signs |= place | ((uint64_t)last - place);
    }
    return signs <= INT64_MAX;
}

static int pair_valid(const pk_pair *pair) {
    if ((unsigned)pair->dtype >= PK_NDTYPES || pair->n < 0 || (!pair->w && pair->n)) return 0;
    return !pair->places || places_valid(pair);
}

static int operand_valid(const pk_operand *by, const pk_pair *pair) {
    return (unsigned)by->dtype < PK_NDTYPES && (by->dtype == PK_F64) == (pair->dtype == PK_F64) && by->run > 0 &&
           (!pair->n || (by->values && by->count > 0));
}

static int exchange_run(exchange_job *job, pk_parallel_fn par) {
    job->isa = pk_isa_now();
    return run_parallel(par, (job->pair.n + BLOCK - 1) / BLOCK, BLOCK / 4, exchange_range, job);
}

int pk_exchange(const pk_pair *pair, const pk_operand *by, unsigned flags, uint64_t *digest, pk_parallel_fn par) {
    exchange_job job = {.pair = *pair, .by = by, .check = flags & PK_CHECK, .hash = digest || pair->hashes};
    const int kept = !by || by->run != 1 || job.check;
    if (!pair_valid(pair) || (kept && !pair->other && pair->n) || (by && !operand_valid(by, pair))) return PK_EINVAL;
    int rc = exchange_run(&job, par);
    if (rc != PK_OK) return rc;
    if (digest) *digest = atomic_load(&job.digest);
    if (!atomic_load(&job.bad)) return PK_OK;
    job.by = NULL;
    job.check = 0;
    rc = exchange_run(&job, par);
    return rc != PK_OK ? rc : PK_NONFINITE;
}

int pk_exchange_back(const pk_pair *pair, uint64_t digest, pk_parallel_fn par) {
    exchange_job job = {.pair = *pair, .hash = 1, .old = 1};
    if (!pair_valid(pair) || (!pair->other && pair->n)) return PK_EINVAL;
    int rc = exchange_run(&job, par);
    if (rc != PK_OK || atomic_load(&job.digest) == digest) return rc;
    rc = exchange_run(&job, par);
    return rc != PK_OK ? rc : PK_CHANGED;
}

/* w = other in the blocks of w that have their hash; with `old`: they become again what they were */
static void uncombine_range(int64_t begin, int64_t end, void *ctx) {
    exchange_job *const job = ctx;
    const int64_t size = pk_dtype_size(job->pair.dtype);
    operand_window window;
    window.first = window.n = 0;
    for (int64_t i = end; i-- > begin;) { /* what combining wrote last is still in the cache */
        const int64_t from = i * BLOCK, n = min64(job->pair.n - from, BLOCK);
        char *const w = (char *)job->pair.w + from * size, *const other = (char *)job->pair.other + from * size;
        if (!job->old) {
            pk_trace hash;
            trace_start(&hash, NULL, NULL);
            hash_piece(job->isa, hash.hash, w, n * size);
            job->done[i] = trace_hash(&hash) == job->pair.hashes[i];
            if (job->done[i])
                memcpy(w, other, (size_t)(n * size));
            else
                atomic_store_explicit(&job->bad, 1, memory_order_relaxed);
        }
        for (int64_t at = 0; job->old && job->done[i] && at < n; at += PIECE)
            combine_piece(job, &window, from + at, w + at * size, other + at * size, min64(PIECE, n - at), NULL);
    }
}

size_t pk_exchange_blocks(const pk_pair *pair) {
    return (size_t)((pair->n + BLOCK - 1) / BLOCK);
}

int pk_uncombine(const pk_pair *pair, const pk_operand *by, unsigned char *done, pk_parallel_fn par) {
    exchange_job job = {.isa = pk_isa_now(), .pair = *pair, .by = by, .done = done};
    const int64_t blocks = (int64_t)pk_exchange_blocks(pair);
    if (!pair_valid(pair) || pair->places || (pair->n && (!pair->other || !pair->hashes)) || !operand_valid(by, pair))
        return PK_EINVAL;
    int rc = run_parallel(par, blocks, BLOCK / 4, uncombine_range, &job);
    if (rc != PK_OK || !atomic_load(&job.bad)) return rc;
    job.old = 1;
    rc = run_parallel(par, blocks, BLOCK / 4, uncombine_range, &job);
    return rc != PK_OK ? rc : PK_CHANGED;
}

int pk_digest(pk_dtype dtype, const void *w, int64_t n, uint64_t *digest, pk_parallel_fn par) {
    exchange_job job = {.pair = {.dtype = dtype, .w = (void *)(uintptr_t)w, .n = n}, .hash = 1};
    if (!pair_valid(&job.pair)) return PK_EINVAL;
    const int rc = exchange_run(&job, par);
    *digest = atomic_load(&job.digest);
    return rc;
}
