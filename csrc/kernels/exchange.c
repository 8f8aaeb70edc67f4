/* exchange.c: the elements of two arrays change places, block by block; the digest of an array. */
#include <stdatomic.h>
#include <string.h>

#include "record.h"

enum {
    BLOCK = 16384, /* elements that are hashed together */
    PIECE = 1024   /* elements that are worked on at once: few enough to stay in the L1 cache */
};

typedef struct {
    const pk_isa *isa;
    pk_dtype dtype;
    char *w, *other; /* other NULL: only the digest */
    int64_t n;
    int add, check, old; /* old: the digest is of what w was, not of what it becomes */
    _Atomic uint64_t digest;
    atomic_int bad;
} exchange_job;

static void exchange_piece(exchange_job *job, char *w, char *other, int64_t n) {
    const pk_row_kernels *const rows = &job->isa->dtype[job->dtype];
    const size_t bytes = (size_t)(n * pk_dtype_size(job->dtype));
    if (job->add) {
        _Alignas(64) char wide[PIECE * 8];
        rows->pack(other, 0, 1, 1, n, wide, n, 1.0);
        memcpy(other, w, bytes);
        rows->apply(OP_ADD, w, wide, w, n);
    } else {
        char fresh[PIECE * 8]; /* one array after the other: going through both at once is slower */
        memcpy(fresh, other, bytes);
        memcpy(other, w, bytes);
        memcpy(w, fresh, bytes);
    }
    if (job->check && !rows->finite(w, n)) atomic_store_explicit(&job->bad, 1, memory_order_relaxed);
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
    const int64_t size = pk_dtype_size(job->dtype);
    uint64_t digest = 0;
    for (int64_t i = begin; i < end; i++) {
        const int64_t stop = min64(job->n, (i + 1) * BLOCK);
        pk_trace hash;
        trace_start(&hash, NULL, NULL);
        for (int64_t at = i * BLOCK; at < stop; at += PIECE) {
            const int64_t n = min64(PIECE, stop - at);
            if (job->other) exchange_piece(job, job->w + at * size, job->other + at * size, n);
            hash_piece(job->isa, hash.hash, (job->old ? job->other : job->w) + at * size, n * size);
        }
        digest += ((uint64_t)trace_hash(&hash) + 1) * (2 * (uint64_t)i + 1);
    }
    atomic_fetch_add_explicit(&job->digest, digest, memory_order_relaxed);
}

static int exchange_run(exchange_job *job, pk_parallel_fn par) {
    if ((unsigned)job->dtype >= PK_NDTYPES || job->n < 0 || (!job->w && job->n)) return PK_EINVAL;
    job->isa = pk_isa_now();
    return run_parallel(par, (job->n + BLOCK - 1) / BLOCK, BLOCK / 4, exchange_range, job);
}

int pk_exchange(pk_dtype dtype, void *w, void *other, int64_t n, int add, unsigned flags, uint64_t *digest,
                pk_parallel_fn par) {
    exchange_job job = {.dtype = dtype, .w = w, .other = other, .n = n, .add = add, .check = (flags & PK_CHECK) != 0};
    if (!other && n) return PK_EINVAL;
    int rc = exchange_run(&job, par);
    if (rc != PK_OK) return rc;
    *digest = atomic_load(&job.digest);
    if (!atomic_load(&job.bad)) return PK_OK;
    job.add = job.check = 0;
    rc = exchange_run(&job, par);
    return rc != PK_OK ? rc : PK_NONFINITE;
}

int pk_exchange_back(pk_dtype dtype, void *w, void *other, int64_t n, uint64_t digest, pk_parallel_fn par) {
    exchange_job job = {.dtype = dtype, .w = w, .other = other, .n = n, .old = 1};
    if (!other && n) return PK_EINVAL;
    int rc = exchange_run(&job, par);
    if (rc != PK_OK || atomic_load(&job.digest) == digest) return rc;
    rc = exchange_run(&job, par);
    return rc != PK_OK ? rc : PK_CHANGED;
}

int pk_digest(pk_dtype dtype, const void *w, int64_t n, uint64_t *digest, pk_parallel_fn par) {
    exchange_job job = {.dtype = dtype, .w = (void *)(uintptr_t)w, .n = n};
    const int rc = exchange_run(&job, par);
    *digest = atomic_load(&job.digest);
    return rc;
}
