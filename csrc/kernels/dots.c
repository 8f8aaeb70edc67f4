/* dots.c: see dots.h. */
#include "dots.h"

#include "dtype.h"

enum { X_BLOCK = 12, A_BLOCK = 16, FEW_A_BLOCK = 8, COPY_COLS = 256, COPY_ROWS = 16 };

/* to (c, k) = from, as acc or as it is */
typedef struct {
    const pk_isa *isa;
    pk_mat from, to;
    int wide;
} copy_job;

static void copy_range(int64_t begin, int64_t end, void *ctx) {
    const copy_job *const c = ctx;
    const int is_acc = c->to.dtype == (c->wide ? PK_F64 : PK_F32);
    _Alignas(64) char part[COPY_ROWS * COPY_COLS * 4];
    for (int64_t j = begin * COPY_COLS; j < end * COPY_COLS && j < c->from.cols; j += COPY_COLS) {
        const int64_t n = min64(COPY_COLS, c->from.cols - j);
        if (is_acc) mat_pack(c->isa, &c->from, 0, j, c->from.rows, n, mat_at(&c->to, 0, j), c->to.rs, 1.0, c->wide);
        for (int64_t i = 0; !is_acc && i < c->from.rows; i += COPY_ROWS) {
            const int64_t m = min64(COPY_ROWS, c->from.rows - i);
            mat_pack(c->isa, &c->from, i, j, m, n, part, COPY_COLS, 1.0, 0);
            mat_unpack(c->isa, &c->to, i, j, m, n, part, COPY_COLS, 1.0, 0);
        }
    }
}

/* *a becomes a copy of itself in the workspace, contiguous rows of dtype: its own, or acc */
static int make_copy(pk_mat *a, pk_dtype dtype, int wide, work_area *area, pk_parallel_fn par) {
    const int64_t ld = round_up(a->cols, 16) + 16; /* off the power of two: rows do not share cache sets */
    const pk_mat copy = {work_take(area, a->rows * ld * pk_dtype_size(dtype)), a->rows, a->cols, ld, 1, dtype};
    copy_job job = {pk_isa_now(), *a, copy, wide};
    *a = copy;
    if (!area->base) return PK_OK;
    return run_parallel(par, (a->cols + COPY_COLS - 1) / COPY_COLS, a->rows * COPY_COLS / 4, copy_range, &job);
}

static int is_strided(const pk_mat *a) {
    return a->cs != 1 && a->cols > 1;
}

int dots_prepare(dots_job *d, const pk_mat *x, const pk_mat *a, int wide, work_area *area, pk_parallel_fn par) {
    const pk_dtype acc = wide ? PK_F64 : PK_F32;
    const dots_job job = {pk_isa_now(), *x, *a, wide, 0};
    const int pairs = job.isa->dots_in_pairs && x->dtype == PK_BF16 && a->dtype == PK_BF16 && !wide;
    int rc = PK_OK;
    *d = job;
    if (is_strided(x) || wide != (x->dtype == PK_F64)) rc = make_copy(&d->x, pairs ? PK_BF16 : acc, wide, area, par);
    if (rc == PK_OK && (is_strided(a) || (a->dtype != d->x.dtype && a->dtype != acc) ||
                        (a->dtype != acc && !pairs && x->rows > job.isa->few[a->dtype])))
        rc = make_copy(&d->a, pairs ? PK_BF16 : acc, wide, area, par);
    d->kind = d->a.dtype != d->x.dtype;
    return rc;
}

void dots_block(const dots_job *d, int64_t i0, int64_t m, int64_t j0, int64_t r, void *t, int64_t ldt) {
    d->isa->dtype[d->x.dtype].dot[d->kind](mat_at(&d->x, i0, 0), d->x.rs, m, mat_at(&d->a, j0, 0), d->a.rs, r,
                                           d->x.cols, t, ldt);
}

int64_t dots_cost(const dots_job *d, int64_t m, int64_t r) {
    return (m + 8) * r * d->x.cols / 12; /* reading a takes as long as eight rows */
}

typedef struct {
    dots_job d;
    char *t;
    int64_t ldt, a_block, a_blocks;
} dots_all;

static void dots_range(int64_t begin, int64_t end, void *ctx) {
    const dots_all *const all = ctx;
    for (int64_t b = begin; b < end; b++) {
        const int64_t i = b / all->a_blocks * X_BLOCK, j = b % all->a_blocks * all->a_block;
        dots_block(&all->d, i, min64(X_BLOCK, all->d.x.rows - i), j, min64(all->a_block, all->d.a.rows - j),
                   all->t + (i * all->ldt + j) * acc_size(all->d.wide), all->ldt);
    }
}

int dots_run(const pk_mat *x, const pk_mat *a, void *t, int64_t ldt, int wide, work_area *area, pk_parallel_fn par) {
    const size_t mark = area->used;
    const int64_t a_block = x->rows <= X_BLOCK ? FEW_A_BLOCK : A_BLOCK;
    dots_all all = {.t = t, .ldt = ldt, .a_block = a_block, .a_blocks = (a->rows + a_block - 1) / a_block};
    int rc = dots_prepare(&all.d, x, a, wide, area, par);
    if (area->base && rc == PK_OK)
        rc = run_parallel(par, (x->rows + X_BLOCK - 1) / X_BLOCK * all.a_blocks,
                          dots_cost(&all.d, min64(x->rows, X_BLOCK), min64(a->rows, a_block)), dots_range, &all);
    area->used = mark;
    return rc;
}
