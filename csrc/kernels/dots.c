/* dots.c: t = x a^T, the contraction along the long side of both: forward's x A^T, backward's g B. */
#include "dots.h"

#include "dtype.h"

enum { X_BLOCK = 12, A_BLOCK = 16, COPY_COLS = 512, CONVERT_FROM = 16 };

typedef struct {
    const pk_isa *isa;
    pk_mat from;
    char *to;
    int64_t ld;
    int wide;
} copy_job;

static void copy_range(int64_t begin, int64_t end, void *ctx) {
    const copy_job *const c = ctx;
    for (int64_t j = begin * COPY_COLS; j < end * COPY_COLS && j < c->from.cols; j += COPY_COLS)
        mat_pack(c->isa, &c->from, 0, j, c->from.rows, min64(COPY_COLS, c->from.cols - j),
                 c->to + j * acc_size(c->wide), c->ld, 1.0, c->wide);
}

/* a as contiguous rows of acc in the workspace */
static int make_copy(pk_mat *a, int wide, work_area *area, pk_parallel_fn par) {
    const int64_t ld = round_up(a->cols, 16) + 16; /* off the power of two: rows do not share cache sets */
    const copy_job c = {pk_isa_now(), *a, work_take(area, a->rows * ld * acc_size(wide)), ld, wide};
    const pk_mat copy = {c.to, a->rows, a->cols, ld, 1, wide ? PK_F64 : PK_F32};
    *a = copy;
    if (!area->base) return PK_OK;
    copy_job job = c;
    return run_parallel(par, (a->cols + COPY_COLS - 1) / COPY_COLS, a->rows * COPY_COLS / 4, copy_range, &job);
}

typedef struct {
    const pk_isa *isa;
    pk_mat x, a;
    char *t;
    int64_t ldt, a_blocks;
    int wide, kind;
} dots_job;

static void dots_range(int64_t begin, int64_t end, void *ctx) {
    const dots_job *const d = ctx;
    for (int64_t i = begin; i < end; i++) {
        const int64_t xi = i / d->a_blocks * X_BLOCK, aj = i % d->a_blocks * A_BLOCK;
        d->isa->dtype[d->x.dtype].dot[d->kind](mat_at(&d->x, xi, 0), d->x.rs, min64(X_BLOCK, d->x.rows - xi),
                                               mat_at(&d->a, aj, 0), d->a.rs, min64(A_BLOCK, d->a.rows - aj),
                                               d->x.cols, d->t + (xi * d->ldt + aj) * acc_size(d->wide), d->ldt);
    }
}

int dots_run(const pk_mat *x, const pk_mat *a, void *t, int64_t ldt, int wide, work_area *area, pk_parallel_fn par) {
    const size_t mark = area->used;
    const pk_dtype acc = wide ? PK_F64 : PK_F32;
    dots_job d = {pk_isa_now(), *x, *a, t, ldt, (a->rows + A_BLOCK - 1) / A_BLOCK, wide, 0};
    int rc = PK_OK;
    if ((x->cs != 1 && x->cols > 1) || wide != (x->dtype == PK_F64)) rc = make_copy(&d.x, wide, area, par);
    if (rc == PK_OK && ((a->cs != 1 && a->cols > 1) || (a->dtype != d.x.dtype && a->dtype != acc) ||
                        (a->dtype != acc && x->rows >= CONVERT_FROM)))
        rc = make_copy(&d.a, wide, area, par);
    d.kind = d.a.dtype != d.x.dtype;
    if (area->base && rc == PK_OK) {
        const int64_t blocks = (x->rows + X_BLOCK - 1) / X_BLOCK * d.a_blocks;
        const int64_t work = min64(x->rows, X_BLOCK) * min64(a->rows, A_BLOCK) * x->cols / 12;
        rc = run_parallel(par, blocks, work, dots_range, &d);
    }
    area->used = mark;
    return rc;
}

static int shrink_valid(const pk_mat *t, const pk_mat *x, const pk_mat *a) {
    return mat_valid(x) && mat_valid(a) && x->cols == a->cols &&
           (!t || (mat_valid(t) && t->rows == x->rows && t->cols == a->rows));
}

static int shrink(const pk_mat *t, const pk_mat *x, const pk_mat *a, double scale, work_area *area,
                  pk_parallel_fn par) {
    const int wide = x->dtype == PK_F64 || a->dtype == PK_F64;
    void *const acc = work_take(area, x->rows * a->rows * acc_size(wide));
    const int rc = dots_run(x, a, acc, a->rows, wide, area, par);
    if (rc == PK_OK && area->base) mat_unpack(pk_isa_now(), t, 0, 0, x->rows, a->rows, acc, a->rows, scale, wide);
    return rc;
}

size_t pk_shrink_work(const pk_mat *x, const pk_mat *a) {
    work_area area = {NULL, 0, 0};
    if (!shrink_valid(NULL, x, a)) return 0;
    shrink(NULL, x, a, 1.0, &area, NULL);
    return work_total(&area);
}

int pk_shrink(const pk_mat *t, const pk_mat *x, const pk_mat *a, double scale, void *work, pk_parallel_fn par) {
    work_area area = work_start(work);
    if (!t || !shrink_valid(t, x, a)) return PK_EINVAL;
    if (x->rows == 0 || a->rows == 0) return PK_OK;
    return shrink(t, x, a, scale, &area, par);
}
