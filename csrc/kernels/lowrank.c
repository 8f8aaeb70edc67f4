/* lowrank.c: the low-rank forward and its backward. Functions that take a work_area only count when its base is NULL. */
#include "dots.h"
#include "dtype.h"

enum { FEW_ROWS = 16, OUTER_ROWS = 48 };

/* ---------------------------------------------------------------------------------------------------------- expand */

/* y (m, n) op= t (m, R) down (R, n), down in parts, each with a scale; t acc, contiguous */
typedef struct {
    const pk_isa *isa;
    const pk_mat *y;
    const pk_lowrank *parts; /* down: (r_i, n) */
    int nparts, wide;
    int64_t rank;
    char *t_scaled; /* (R, m) */
    row_op op;
} expand_job;

/* rows p0 .. p0 + np of the stacked parts, columns j0 .. j0 + nj, to the panel */
static void pack_parts(const expand_job *e, int64_t p0, int64_t np, int64_t j0, int64_t nj, char *panel, int64_t nr) {
    int64_t start = 0;
    for (int i = 0; i < e->nparts; i++) {
        const pk_mat *const down = &e->parts[i].down;
        const int64_t lo = max64(p0, start), hi = min64(p0 + np, start + down->rows);
        if (lo < hi)
            mat_pack(e->isa, down, lo - start, j0, hi - lo, nj, panel + (lo - p0) * nr * acc_size(e->wide), nr, 1.0,
                     e->wide);
        start += down->rows;
    }
}

static void expand_range(int64_t begin, int64_t end, void *ctx) {
    const expand_job *const e = ctx;
    const int64_t m = e->y->rows, nr = e->isa->nr[e->wide], size = acc_size(e->wide);
    _Alignas(64) char panel[DEPTH * NR_MAX * 4];
    _Alignas(64) char d[FEW_ROWS * NR_MAX * 4];
    for (int64_t j = begin; j < end; j++) {
        const int64_t n = min64(nr, e->y->cols - j * nr);
        if (n < nr) memset(panel, 0, sizeof panel);
        for (int64_t p = 0; p < e->rank; p += DEPTH) {
            const int64_t np = min64(DEPTH, e->rank - p);
            pack_parts(e, p, np, j * nr, n, panel, nr);
            for (int64_t i = 0; i < m; i += MR)
                e->isa->tile[e->wide](np, e->t_scaled + (p * m + i) * size, m, panel, d + i * nr * size, nr,
                                      (int)min64(MR, m - i), p > 0);
        }
        for (int64_t i = 0; i < m; i++) {
            char *const y = mat_at(e->y, i, j * nr);
            e->isa->dtype[e->y->dtype].apply(e->op, y, d + i * nr * size, y, n);
        }
    }
}

/* t_scaled (R, m) = transposed t, times each part's scale */
static void scale_t(const expand_job *e, const void *t) {
    const int64_t m = e->y->rows;
    int64_t p = 0;
    for (int q = 0; q < e->nparts; q++) {
        const double s = e->parts[q].scale;
        for (const int64_t stop = p + e->parts[q].down.rows; p < stop; p++)
            for (int64_t i = 0; i < m; i++) {
                const int64_t from = i * e->rank + p, to = p * m + i;
                if (e->wide)
                    ((double *)(void *)e->t_scaled)[to] = s * ((const double *)t)[from];
                else
                    ((float *)(void *)e->t_scaled)[to] = (float)s * ((const float *)t)[from];
            }
    }
}

static int expand(const pk_mat *y, const pk_lowrank *parts, int nparts, int64_t rank, const void *t, int wide,
                  row_op op, work_area *area, pk_parallel_fn par) {
    const size_t mark = area->used;
    const int64_t size = acc_size(wide);
    int rc = PK_OK;
    if (rank > 0 && y->rows <= FEW_ROWS && (y->cs == 1 || y->cols <= 1) && wide == (y->dtype == PK_F64)) {
        expand_job e = {pk_isa_now(), y, parts, nparts, wide, rank, work_take(area, y->rows * rank * size), op};
        if (area->base) {
            const int64_t nr = e.isa->nr[wide];
            scale_t(&e, t);
            rc = run_parallel(par, (y->cols + nr - 1) / nr, rank * nr * (4 + y->rows) / 12, expand_range, &e);
        }
    } else {
        pk_lowrank *const f = work_take(area, nparts * (int64_t)sizeof *f);
        char *const work = work_take(area, (int64_t)product_work(y, parts, nparts));
        int64_t at = 0;
        for (int i = 0; area->base && i < nparts; at += parts[i++].down.rows) {
            const pk_mat up = {
                (char *)(uintptr_t)t + at * size, y->rows, parts[i].down.rows, rank, 1, wide ? PK_F64 : PK_F32};
            f[i] = (pk_lowrank){parts[i].down, up, parts[i].scale};
        }
        if (area->base) rc = product_run(y, f, nparts, op, work, par);
    }
    area->used = mark;
    return rc;
}

/* --------------------------------------------------------------------------------------------------------- forward */

static int64_t rank_of(const pk_lowrank *f, int nf) {
    int64_t rank = 0;
    for (int i = 0; i < nf; i++) rank += f[i].down.rows;
    return rank;
}

static int factors_fit(const pk_lowrank *f, int nf, int64_t n, int64_t k) {
    if (nf < 0 || (nf > 0 && !f)) return 0;
    for (int i = 0; i < nf; i++)
        if (!mat_valid(&f[i].down) || !mat_valid(&f[i].up) || f[i].down.cols != k || f[i].up.rows != n ||
            f[i].down.rows != f[i].up.cols)
            return 0;
    return 1;
}

static int forward(const pk_mat *y, const pk_mat *x, const pk_lowrank *f, int nf, const pk_mat *t, work_area *area,
                   pk_parallel_fn par) {
    const int wide = y->dtype == PK_F64 || x->dtype == PK_F64;
    const int64_t rank = rank_of(f, nf), size = acc_size(wide);
    pk_lowrank *const parts = work_take(area, nf * (int64_t)sizeof *parts);
    char *const acc = work_take(area, y->rows * rank * size);
    int64_t at = 0;
    int rc = PK_OK;
    for (int i = 0; i < nf && rc == PK_OK; at += f[i++].down.rows) {
        rc = dots_run(x, &f[i].down, area->base ? acc + at * size : NULL, rank, wide, area, par);
        if (area->base) parts[i] = (pk_lowrank){mat_transposed(f[i].up), f[i].up, f[i].scale};
    }
    if (rc == PK_OK && area->base && t && t->data)
        mat_unpack(pk_isa_now(), t, 0, 0, y->rows, rank, acc, rank, 1.0, wide);
    if (rc != PK_OK || rank == 0) return rc;
    return expand(y, area->base ? parts : f, nf, rank, acc, wide, OP_ADD, area, par);
}

static int forward_valid(const pk_mat *y, const pk_mat *x, const pk_lowrank *f, int nf) {
    return mat_valid(y) && mat_valid(x) && y->rows == x->rows && factors_fit(f, nf, y->cols, x->cols);
}

size_t pk_lowrank_apply_work(const pk_mat *y, const pk_mat *x, const pk_lowrank *f, int nf) {
    work_area area = {NULL, 0, 0};
    if (!forward_valid(y, x, f, nf)) return 0;
    forward(y, x, f, nf, NULL, &area, NULL);
    return work_total(&area);
}

int pk_lowrank_apply(const pk_mat *y, const pk_mat *x, const pk_lowrank *f, int nf, const pk_mat *t, void *work,
                     pk_parallel_fn par) {
    work_area area = work_start(work);
    if (!forward_valid(y, x, f, nf)) return PK_EINVAL;
    if (t && t->data && (!mat_valid(t) || t->rows != y->rows || t->cols != rank_of(f, nf))) return PK_EINVAL;
    if (y->rows == 0 || nf == 0) return PK_OK;
    return forward(y, x, f, nf, t, &area, par);
}

/* -------------------------------------------------------------------------------------------------------- backward */

/* out (r, c) = scale * u^T x, u (m, r) acc with rows ldu apart, x (m, c) */
typedef struct {
    const pk_isa *isa;
    pk_mat out, x;
    const char *u;
    int64_t ldu;
    double scale;
    int wide;
} outer_job;

static void outer_range(int64_t begin, int64_t end, void *ctx) {
    const outer_job *const o = ctx;
    const int64_t nr = o->isa->nr[o->wide], size = acc_size(o->wide), m = o->x.rows, r = o->out.rows;
    _Alignas(64) char panel[DEPTH * NR_MAX * 4];
    _Alignas(64) char d[OUTER_ROWS * NR_MAX * 4];
    for (int64_t j = begin; j < end; j++) {
        const int64_t n = min64(nr, o->out.cols - j * nr);
        if (n < nr) memset(panel, 0, sizeof panel);
        for (int64_t r0 = 0; r0 < r; r0 += OUTER_ROWS) {
            const int64_t rows = min64(OUTER_ROWS, r - r0);
            memset(d, 0, sizeof d);
            for (int64_t p = 0; p < m; p += DEPTH) {
                const int64_t np = min64(DEPTH, m - p);
                mat_pack(o->isa, &o->x, p, j * nr, np, n, panel, nr, 1.0, o->wide);
                for (int64_t i = 0; i < rows; i += MR)
                    o->isa->tile[o->wide](np, o->u + (p * o->ldu + r0 + i) * size, o->ldu, panel, d + i * nr * size,
                                          nr, (int)min64(MR, rows - i), 1);
            }
            mat_unpack(o->isa, &o->out, r0, j * nr, rows, n, d, nr, o->scale, o->wide);
        }
    }
}

static int outer(const pk_mat *out, const char *u, int64_t ldu, const pk_mat *x, double scale, int wide,
                 pk_parallel_fn par) {
    outer_job o = {pk_isa_now(), *out, *x, u, ldu, scale, wide};
    const int64_t nr = o.isa->nr[wide];
    return run_parallel(par, (out->cols + nr - 1) / nr, x->rows * nr * (out->rows + 8) / 12, outer_range, &o);
}

static int backward(const pk_backward *q, work_area *area, pk_parallel_fn par) {
    const pk_mat *const a = &q->factor.down;
    const int wide = q->g.dtype == PK_F64 || q->x.dtype == PK_F64 || (q->dx.data && q->dx.dtype == PK_F64);
    const int64_t m = q->g.rows, r = a->rows, bytes = m * r * acc_size(wide);
    const pk_lowrank part = {*a, q->factor.up, q->factor.scale};
    int rc = PK_OK;
    if (q->dx.data || q->da.data) {
        const pk_mat bt = mat_transposed(q->factor.up);
        char *const u = work_take(area, bytes);
        rc = dots_run(&q->g, &bt, u, r, wide, area, par);
        if (rc == PK_OK && q->dx.data)
            rc = expand(&q->dx, &part, 1, r, u, wide, q->dx_add ? OP_ADD : OP_SET, area, par);
        if (rc == PK_OK && q->da.data && area->base) rc = outer(&q->da, u, r, &q->x, q->factor.scale, wide, par);
    }
    if (rc == PK_OK && q->db.data) {
        const pk_mat dbt = mat_transposed(q->db);
        char *const t = work_take(area, bytes);
        if (q->t.data && area->base)
            mat_pack(pk_isa_now(), &q->t, 0, 0, m, r, t, r, 1.0, wide);
        else if (!q->t.data)
            rc = dots_run(&q->x, a, t, r, wide, area, par);
        if (rc == PK_OK && area->base) rc = outer(&dbt, t, r, &q->g, q->factor.scale, wide, par);
    }
    return rc;
}

static int shaped(const pk_mat *a, int64_t rows, int64_t cols) {
    return !a->data || (mat_valid(a) && a->rows == rows && a->cols == cols);
}

static int backward_valid(const pk_backward *q) {
    if (!q || !mat_valid(&q->g)) return 0;
    const int64_t m = q->g.rows, n = q->g.cols, r = q->factor.down.rows, k = q->factor.down.cols;
    const int need_x = (q->da.data || (q->db.data && !q->t.data)) && m > 0 && k > 0;
    return factors_fit(&q->factor, 1, n, k) && shaped(&q->x, m, k) && shaped(&q->t, m, r) && shaped(&q->dx, m, k) &&
           shaped(&q->da, r, k) && shaped(&q->db, n, r) && (!need_x || q->x.data);
}

size_t pk_lowrank_backward_work(const pk_backward *q) {
    work_area area = {NULL, 0, 0};
    if (!backward_valid(q)) return 0;
    backward(q, &area, NULL);
    return work_total(&area);
}

int pk_lowrank_backward(const pk_backward *q, void *work, pk_parallel_fn par) {
    work_area area = work_start(work);
    return backward_valid(q) ? backward(q, &area, par) : PK_EINVAL;
}
