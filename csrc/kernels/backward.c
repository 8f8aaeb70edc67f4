/* backward.c: the products of a low-rank term's backward. */
#include "dots.h"
#include "dtype.h"
#include "lowrank.h"

enum { OUTER_ROWS = 48, OUTER_DEPTH = 64, GRAD_DEPTH = 32, GRAD_PANELS = 4 };

/* out (r, c) = scale * u^T x, u (m, r) acc with rows ldu apart, x (m, c) */
typedef struct {
    const pk_isa *isa;
    pk_mat out, x;
    const char *u;
    int64_t ldu;
    double scale;
    int wide;
} outer_job;

/* out(r0 + i, j0 + j) = scale * d[i * nr + j], i < rows, j < n; d is used up */
static void outer_put(const outer_job *o, int64_t r0, int64_t j0, int64_t rows, int64_t n, char *d) {
    const pk_row_kernels *const acc = &o->isa->dtype[o->wide ? PK_F64 : PK_F32];
    const int64_t nr = o->isa->nr[o->wide];
    _Alignas(64) char turned[OUTER_ROWS * NR_MAX * 4];
    if (o->out.cs == 1 || o->out.rs != 1) {
        acc->pack(d, nr, 1, rows, n, d, nr, o->scale);
        mat_unpack(o->isa, &o->out, r0, j0, rows, n, d, nr, 1.0, o->wide);
    } else {
        const pk_mat out = mat_transposed(o->out);
        acc->pack(d, 1, nr, n, rows, turned, OUTER_ROWS, o->scale);
        mat_unpack(o->isa, &out, j0, r0, n, rows, turned, OUTER_ROWS, 1.0, o->wide);
    }
}

static void outer_range(int64_t begin, int64_t end, void *ctx) {
    const outer_job *const o = ctx;
    const int64_t nr = o->isa->nr[o->wide], size = acc_size(o->wide), m = o->x.rows, r = o->out.rows;
    _Alignas(64) char panel[OUTER_DEPTH * NR_MAX * 4];
    _Alignas(64) char d[OUTER_ROWS * NR_MAX * 4];
    for (int64_t j = begin; j < end; j++) {
        const int64_t n = min64(nr, o->out.cols - j * nr);
        if (n < nr) memset(panel, 0, sizeof panel);
        for (int64_t r0 = 0; r0 < r; r0 += OUTER_ROWS) {
            const int64_t rows = min64(OUTER_ROWS, r - r0);
            for (int64_t p = 0; p == 0 || p < m; p += OUTER_DEPTH) { /* once even for no rows: sums of nothing */
                const int64_t np = min64(OUTER_DEPTH, m - p);
                mat_pack(o->isa, &o->x, p, j * nr, np, n, panel, nr, 1.0, o->wide);
                for (int64_t i = 0; i < rows; i += MR)
                    o->isa->tile[o->wide](np, o->u + (p * o->ldu + r0 + i) * size, o->ldu, panel, d + i * nr * size,
                                          nr, (int)min64(MR, rows - i), p > 0);
            }
            outer_put(o, r0, j * nr, rows, n, d);
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
    const pk_lowrank part = {mat_transposed(q->factor.up), mat_transposed(*a), q->factor.scale};
    int rc = PK_OK;
    if (q->dx.data || q->da.data) {
        char *const u = work_take(area, bytes);
        if (q->dx.data)
            rc = product_run(&q->dx, &q->g, &part, 1, wide, q->dx_add ? OP_ADD : OP_SET, u, area, par);
        else
            rc = dots_run(&q->g, &part.down, u, r, wide, area, par);
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

/* --------------------------------------------------------------------------------------------------- linear layers */

/* Where pk_linear_grad takes less time than torch's g @ w; as for pk_linear_suits, pk_linear_grad / torch:
 *                rows      1         2          4          8         32
 *   f32  2816 x 1024  667/674   643/1263   751/1566  1027/1616  1836/2463
 *         256 x 256    15/6      17/15      19/16      25/18      59/45
 *   bf16 2816 x 1024  373/353              509/398    689/460   1505/755
 *   f16  2816 x 1024  571/9169              515/35594  640/71889 1348/282685
 *         256 x 256    13/40                 18/156     23/311     56/1259
 */
int pk_linear_grad_suits(pk_dtype dtype, int64_t m, int64_t n, int64_t k) {
    if (pk_isa_now()->nr[0] < NR_MAX) return 0;
    return dtype == PK_F16 || (dtype == PK_F32 && m > 1 && m <= 32 && n * k >= LARGE_WEIGHT);
}

/* dx (m, k) = g w; u (n, m): g transposed, as acc */
typedef struct {
    const pk_isa *isa;
    const pk_mat *dx, *w;
    float *u;
} grad_job;

/* Blocks of columns: w is read row by row, some rows at a time, and the sums wait in the cache. */
static void grad_columns(int64_t begin, int64_t end, void *ctx) {
    const grad_job *const e = ctx;
    const int64_t nr = e->isa->nr[0], m = e->dx->rows, block = GRAD_PANELS * nr;
    _Alignas(64) float panel[GRAD_DEPTH * NR_MAX];
    _Alignas(64) float d[LINEAR_ROWS * GRAD_PANELS * NR_MAX];
    for (int64_t b = begin; b < end; b++) {
        const int64_t j0 = b * block, cols = min64(block, e->w->cols - j0);
        for (int64_t p = 0; p == 0 || p < e->w->rows; p += GRAD_DEPTH) { /* once even for no rows: sums of nothing */
            const int64_t np = min64(GRAD_DEPTH, e->w->rows - p);
            for (int64_t j = 0; j < cols; j += nr) {
                if (cols - j < nr) memset(panel, 0, sizeof panel);
                for (int64_t q = np; q < 2 * np && p + q < e->w->rows; q++) { /* what comes next */
                    const char *const next = mat_at(e->w, p + q, j0 + j);
                    for (int64_t c = 0; c < nr * pk_dtype_size(e->w->dtype); c += 64)
                        __builtin_prefetch(next + c, 0, 2);
                }
                mat_pack(e->isa, e->w, p, j0 + j, np, min64(nr, cols - j), panel, nr, 1.0, 0);
                for (int64_t i = 0; i < m; i += MR)
                    e->isa->tile[0](np, e->u + p * m + i, m, panel, d + i * block + j, block, (int)min64(MR, m - i),
                                    p > 0);
            }
        }
        mat_unpack(e->isa, e->dx, 0, j0, m, cols, d, block, 1.0, 0);
    }
}

static int linear_grad(const pk_mat *dx, const pk_mat *g, const pk_mat *w, work_area *area, pk_parallel_fn par) {
    const pk_mat turned = mat_transposed(*g);
    const int64_t m = g->rows;
    grad_job e = {pk_isa_now(), dx, w, work_take(area, g->cols * m * acc_size(0))};
    const int64_t block = GRAD_PANELS * e.isa->nr[0];
    if (!area->base) return PK_OK;
    mat_pack(e.isa, &turned, 0, 0, g->cols, m, e.u, m, 1.0, 0);
    return run_parallel(par, (dx->cols + block - 1) / block, g->cols * block * (m + 8) / 12, grad_columns, &e);
}

static int linear_grad_valid(const pk_mat *dx, const pk_mat *g, const pk_mat *w) {
    return mat_valid(dx) && mat_valid(g) && mat_valid(w) && dx->rows == g->rows && g->cols == w->rows &&
           dx->cols == w->cols && dx->dtype != PK_F64 && g->dtype != PK_F64 && w->dtype != PK_F64;
}

size_t pk_linear_grad_work(const pk_mat *dx, const pk_mat *g, const pk_mat *w) {
    work_area area = {NULL, 0, 0};
    if (!linear_grad_valid(dx, g, w)) return 0;
    const pk_mat gm = mat_rows(*g, 0, min64(g->rows, LINEAR_ROWS));
    linear_grad(dx, &gm, w, &area, NULL);
    return work_total(&area);
}

int pk_linear_grad(const pk_mat *dx, const pk_mat *g, const pk_mat *w, void *work, pk_parallel_fn par) {
    int rc = PK_OK;
    if (!linear_grad_valid(dx, g, w)) return PK_EINVAL;
    for (int64_t i = 0; i < g->rows && rc == PK_OK; i += LINEAR_ROWS) {
        const int64_t m = min64(LINEAR_ROWS, g->rows - i);
        const pk_mat dm = mat_rows(*dx, i, m), gm = mat_rows(*g, i, m);
        work_area area = work_start(work);
        rc = linear_grad(&dm, &gm, w, &area, par);
    }
    return rc;
}
