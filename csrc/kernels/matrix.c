/* matrix.c: views: validity, conversion to and from acc, raw copies, the finite check, running in parallel. */
#include <stdatomic.h>

#include "dtype.h"
#include "internal.h"

int64_t pk_dtype_size(pk_dtype dtype) {
    switch (dtype) {
    case PK_F64:
        return 8;
    case PK_F32:
        return 4;
    default:
        return 2;
    }
}

int mat_valid(const pk_mat *a) {
    return a && (unsigned)a->dtype < PK_NDTYPES && a->rows >= 0 && a->cols >= 0 &&
           (a->data || a->rows == 0 || a->cols == 0);
}

static void acc_set(void *dst, int64_t i, double v, int wide) {
    if (wide)
        ((double *)dst)[i] = v;
    else
        ((float *)dst)[i] = (float)v;
}

static double acc_get(const void *src, int64_t i, int wide) {
    return wide ? ((const double *)src)[i] : (double)((const float *)src)[i];
}

void mat_pack(const pk_isa *isa, const pk_mat *a, int64_t p0, int64_t j0, int64_t np, int64_t nj, void *dst,
              int64_t ld, double scale, int wide) {
    if (np <= 0 || nj <= 0) return;
    if (wide == (a->dtype == PK_F64)) {
        isa->dtype[a->dtype].pack(mat_at(a, p0, j0), a->rs, a->cs, np, nj, dst, ld, scale);
        return;
    }
    for (int64_t p = 0; p < np; p++)
        for (int64_t j = 0; j < nj; j++)
            acc_set(dst, p * ld + j, scale * scalar_load(a->dtype, mat_at(a, p0 + p, j0 + j)), wide);
}

void mat_unpack(const pk_isa *isa, const pk_mat *a, int64_t p0, int64_t j0, int64_t np, int64_t nj, const void *src,
                int64_t ld, double scale, int wide) {
    const int plain = scale == 1.0 && a->cs == 1 && wide == (a->dtype == PK_F64);
    for (int64_t p = 0; p < np; p++) {
        if (plain) {
            char *const to = mat_at(a, p0 + p, j0);
            isa->dtype[a->dtype].apply(OP_SET, to, (const char *)src + p * ld * acc_size(wide), to, nj);
            continue;
        }
        for (int64_t j = 0; j < nj; j++) {
            double v = acc_get(src, p * ld + j, wide) * scale;
            if (!wide) v = (double)(float)v;
            scalar_store(a->dtype, mat_at(a, p0 + p, j0 + j), v);
        }
    }
}

void mat_fetch(const pk_mat *a, int64_t p0, int64_t np, int64_t j0, int64_t nj, int64_t g, int64_t n) {
    const int64_t rows = min64(np, a->rows - p0), cols = min64(nj, a->cols - j0), along = a->rs == 1 && a->cs != 1;
    const int64_t runs = along ? cols : rows, bytes = (along ? rows : cols) * pk_dtype_size(a->dtype);
    for (int64_t r = g * runs / n; r < (g + 1) * runs / n; r++) {
        const char *const at = along ? mat_at(a, p0, j0 + r) : mat_at(a, p0 + r, j0);
        for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(at + b, 0, 2);
    }
}

void bits_gather(const pk_mat *a, int64_t i, int64_t j, int64_t n, void *dst) {
    const size_t size = (size_t)pk_dtype_size(a->dtype);
    for (int64_t q = 0; q < n; q++) memcpy((char *)dst + (size_t)q * size, mat_at(a, i, j + q), size);
}

void bits_scatter(const pk_mat *a, int64_t i, int64_t j, int64_t n, const void *src) {
    const size_t size = (size_t)pk_dtype_size(a->dtype);
    for (int64_t q = 0; q < n; q++) memcpy(mat_at(a, i, j + q), (const char *)src + (size_t)q * size, size);
}

int run_parallel(pk_parallel_fn par, int64_t n, int64_t work, pk_range_fn fn, void *ctx) {
    const int64_t enough = 8000; /* cycles: a fork-join of a thread that is awake takes some 5000 */
    const int64_t grain = max64(1, enough / max64(work, 1));
    if (n <= 0) return PK_OK;
    if (!par || n <= grain) {
        fn(0, n, ctx);
        return PK_OK;
    }
    return par(0, n, grain, fn, ctx) == 0 ? PK_OK : PK_EPARALLEL;
}

typedef struct {
    const pk_mat *a;
    const pk_isa *isa;
    atomic_int bad;
} finite_job;

static void finite_rows(int64_t begin, int64_t end, void *ctx) {
    finite_job *const job = ctx;
    const pk_mat *const a = job->a;
    uint64_t buffer[256];
    const int64_t step = (int64_t)sizeof buffer / pk_dtype_size(a->dtype);
    for (int64_t i = begin; i < end && !atomic_load_explicit(&job->bad, memory_order_relaxed); i++) {
        int ok = 1;
        if (a->cs == 1) {
            ok = job->isa->dtype[a->dtype].finite(mat_at(a, i, 0), a->cols);
        } else {
            for (int64_t j = 0; ok && j < a->cols; j += step) {
                const int64_t n = min64(step, a->cols - j);
                bits_gather(a, i, j, n, buffer);
                ok = job->isa->dtype[a->dtype].finite(buffer, n);
            }
        }
        if (!ok) atomic_store_explicit(&job->bad, 1, memory_order_relaxed);
    }
}

int pk_finite(const pk_mat *a, pk_parallel_fn par) {
    if (!mat_valid(a)) return PK_EINVAL;
    pk_mat m = *a;
    if (m.cs != 1 && m.rs == 1) m = mat_transposed(m);
    if (m.rs == m.cols * m.cs && m.rows > 1) { /* one long row: cut evenly */
        const int64_t size = m.rows * m.cols, piece = 16384;
        const pk_mat main = {m.data, size / piece, piece, piece * m.cs, m.cs, m.dtype};
        const pk_mat rest = {mat_at(&main, main.rows, 0), 1, size % piece, 0, m.cs, m.dtype};
        finite_job job = {&main, pk_isa_now(), 0};
        if (run_parallel(par, main.rows, piece / 8, finite_rows, &job) != PK_OK) return PK_EPARALLEL;
        job.a = &rest;
        if (rest.cols) finite_rows(0, 1, &job);
        return !job.bad;
    }
    finite_job job = {&m, pk_isa_now(), 0};
    if (run_parallel(par, m.rows, m.cols / 8, finite_rows, &job) != PK_OK) return PK_EPARALLEL;
    return !job.bad;
}
