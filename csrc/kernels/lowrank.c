/* lowrank.c: the low-rank forward, and the product that it shares with the backward. */
#include "lowrank.h"

#include "dots.h"
#include "dtype.h"
#include "terms.h"

enum { FEW_ROWS = 16, BLOCK_ROWS = 12, MANY_ROWS = 512, MANY_BLOCK_ROWS = 48, STRIPS = 32768 /* bytes of panels */ };

typedef struct {
    term_sums s;
    const pk_mat *y;
    const int64_t *ids;   /* NULL, or where the rows of t are looked up, which is not kept then */
    const dots_job *dots; /* of each part; many rows only, NULL with ids */
    int direct, strips;
    row_op op;
    int64_t block;
    char *t;      /* (m, R) */
    char *turned; /* t times the scales, transposed: (words, m), with many rows block by block */
    char *halves; /* for terms_turn */
    char *panels; /* many rows: (n / nr, words, nr), up, zero padded */
} product_job;

/* ---------------------------------------------------------------------------------------------------------- expand */

static int64_t panel_cols(const product_job *e) {
    return e->s.isa->nr[e->s.wide];
}

static void pack_panels(int64_t begin, int64_t end, void *ctx) {
    const product_job *const e = ctx;
    const int64_t nr = panel_cols(e), bytes = e->s.depth * nr * acc_size(e->s.wide);
    for (int64_t j = begin; j < end; j++)
        terms_pack(&e->s, 0, e->s.depth, j * nr, min64(nr, e->y->cols - j * nr), e->panels + j * bytes);
}

/* to[q] = scale times element ids[q] of a row of this type */
static INLINE void look_up_row(pk_dtype dtype, const char *row, int64_t step, const int64_t *ids, int64_t m,
                               double scale, int wide, void *to) {
    for (int64_t q = 0; q < m; q++) {
        const double v = scalar_load(dtype, row + ids[q] * step);
        if (wide)
            ((double *)to)[q] = v * scale;
        else
            ((float *)to)[q] = (float)v * (float)scale;
    }
}

/* rows i0 .. i0 + m of t, turned: (R, m) */
static void look_up(const product_job *e, int64_t i0, int64_t m, char *turned) {
    const int64_t *const ids = e->ids + i0;
    for (int i = 0; i < e->s.nparts; i++) {
        const pk_mat *const a = &e->s.parts[i].down;
        const int64_t step = a->cs * pk_dtype_size(a->dtype);
        const double scale = e->s.parts[i].scale;
        for (int64_t p = 0; p < a->rows; p++, turned += m * acc_size(e->s.wide)) {
            const char *const row = mat_at(a, p, 0);
            if (a->dtype == PK_F32)
                look_up_row(PK_F32, row, step, ids, m, scale, e->s.wide, turned);
            else if (a->dtype == PK_F64)
                look_up_row(PK_F64, row, step, ids, m, scale, e->s.wide, turned);
            else if (a->dtype == PK_BF16)
                look_up_row(PK_BF16, row, step, ids, m, scale, e->s.wide, turned);
            else
                look_up_row(PK_F16, row, step, ids, m, scale, e->s.wide, turned);
        }
    }
}

/* rows i0 .. i0 + m of t, looked up or computed before, to where they are expanded from: (R, m) */
static const char *turn(const product_job *e, int64_t i0, int64_t m) {
    const int64_t at = i0 * e->s.rank * acc_size(e->s.wide);
    char *const halves = e->halves ? e->halves + i0 * e->s.rank * 2 : NULL;
    if (e->ids)
        look_up(e, i0, m, e->turned + at);
    else
        terms_turn(&e->s, e->t + at, m, halves, e->turned + at);
    return e->turned + at;
}

/* y(i, j0 + q) op= d[q], q < n */
static void put_row(const product_job *e, int64_t i, int64_t j0, int64_t n, const char *d) {
    char *y = mat_at(e->y, i, j0);
    if (e->direct) {
        e->s.isa->dtype[e->y->dtype].apply(e->op, y, d, y, n);
        return;
    }
    for (int64_t q = 0; q < n; q++, y += e->y->cs * pk_dtype_size(e->y->dtype)) {
        const double old = e->op == OP_SET ? 0 : scalar_load(e->y->dtype, y);
        const double v = e->s.wide ? old + ((const double *)(const void *)d)[q]
                                   : (double)((float)old + ((const float *)(const void *)d)[q]);
        scalar_store(e->y->dtype, y, v);
    }
}

/* few rows: each panel is packed where it is used */
static void expand_columns(int64_t begin, int64_t end, void *ctx) {
    const product_job *const e = ctx;
    const int64_t m = e->y->rows, nr = panel_cols(e), size = acc_size(e->s.wide);
    _Alignas(64) char panel[DEPTH * NR_MAX * 4];
    _Alignas(64) char d[FEW_ROWS * NR_MAX * 4];
    for (int64_t j = begin; j < end; j++) {
        const int64_t n = min64(nr, e->y->cols - j * nr);
        for (int64_t p = 0; p == 0 || p < e->s.depth; p += DEPTH) { /* rank 0: sums of nothing */
            const int64_t np = min64(DEPTH, e->s.depth - p);
            terms_pack(&e->s, p, np, j * nr, n, panel);
            for (int64_t i = 0; i < m; i += MR)
                terms_tile(&e->s, np, e->turned + (p * m + i) * size, m, panel, d + i * nr * size, nr,
                           (int)min64(MR, m - i), p > 0);
        }
        for (int64_t i = 0; i < m; i++) put_row(e, i, j * nr, n, d + i * nr * size);
    }
}

/* rows i0 .. i0 + m of y; turned: (R, m) */
static void expand_rows(const product_job *e, int64_t i0, int64_t m, const char *turned) {
    const int64_t nr = panel_cols(e), size = acc_size(e->s.wide);
    _Alignas(64) char d[MR * NR_MAX * 4];
    for (int64_t j = 0; j * nr < e->y->cols; j++) {
        const int64_t n = min64(nr, e->y->cols - j * nr);
        pk_strip tile = {.depth = e->s.depth, .scale = 1.0f, .ldrow = m, .ldw = e->y->rs, .cols = nr};
        tile.panel = e->panels + j * e->s.depth * nr * size;
        for (int64_t i = 0; i < m; i += MR) {
            tile.row = turned + i * size;
            tile.w = mat_at(e->y, i0 + i, j * nr);
            tile.next = n == nr && e->direct && i + MR <= m ? mat_at(e->y, i0 + i, (j + 1) * nr) : NULL;
            tile.mr = (int)min64(MR, m - i);
            if (e->direct && n == nr && tile.mr == MR) {
                e->s.isa->dtype[e->y->dtype].fused[e->s.pairs](e->op, &tile);
                continue;
            }
            terms_tile(&e->s, e->s.depth, tile.row, m, tile.panel, d, nr, tile.mr, 0);
            for (int q = 0; q < tile.mr; q++) put_row(e, i0 + i + q, j * nr, n, d + q * nr * size);
        }
    }
}

/* rows i0 .. i0 + m of y; turned: (R, m); for panels that stay in the nearest cache all together */
static void expand_strips(const product_job *e, int64_t i0, int64_t m, const char *turned) {
    const int64_t nr = panel_cols(e), size = acc_size(e->s.wide), whole = e->y->cols / nr * nr;
    _Alignas(64) char d[MR * NR_MAX * 4];
    for (int64_t i = 0; i < m; i += MR) {
        pk_strip strip = {.depth = e->s.depth, .scale = 1.0f, .ldrow = m, .ldw = e->y->rs, .cols = whole};
        strip.row = turned + i * size;
        strip.panel = e->panels;
        strip.w = mat_at(e->y, i0 + i, 0);
        strip.mr = (int)min64(MR, m - i);
        e->s.isa->dtype[e->y->dtype].fused[e->s.pairs](e->op, &strip);
        if (whole == e->y->cols) continue;
        terms_tile(&e->s, e->s.depth, strip.row, m, e->panels + whole * e->s.depth * size, d, nr, strip.mr, 0);
        for (int q = 0; q < strip.mr; q++) put_row(e, i0 + i + q, whole, e->y->cols - whole, d + q * nr * size);
    }
}

/* -------------------------------------------------------------------------------------------------------- products */

/* blocks of rows, shrunk and expanded while they are in the cache */
static void product_rows(int64_t begin, int64_t end, void *ctx) {
    const product_job *const e = ctx;
    const int64_t size = acc_size(e->s.wide);
    for (int64_t b = begin; b < end; b++) {
        const int64_t i0 = b * e->block, m = min64(e->block, e->y->rows - i0);
        int64_t p = i0 * e->s.rank;
        for (int i = 0; !e->ids && i < e->s.nparts; p += e->s.parts[i++].up.cols)
            dots_block(&e->dots[i], i0, m, 0, e->s.parts[i].up.cols, e->t + p * size, e->s.rank);
        (e->strips ? expand_strips : expand_rows)(e, i0, m, turn(e, i0, m));
    }
}

static int product_many(product_job *e, const pk_mat *x, work_area *area, pk_parallel_fn par) {
    const int64_t nr = panel_cols(e), panels = (e->y->cols + nr - 1) / nr, m = e->y->rows;
    dots_job *const dots = e->ids ? NULL : work_take(area, e->s.nparts * (int64_t)sizeof *dots);
    int64_t cost;
    int rc = PK_OK;
    e->block = m < MANY_ROWS ? BLOCK_ROWS : MANY_BLOCK_ROWS;
    e->panels = work_take(area, panels * nr * e->s.depth * acc_size(e->s.wide));
    e->dots = dots;
    cost = e->block * e->s.rank * e->y->cols / 12;
    for (int i = 0; !e->ids && i < e->s.nparts && rc == PK_OK; i++) {
        dots_job job;
        rc = dots_prepare(&job, x, &e->s.parts[i].down, e->s.wide, area, par);
        if (area->base) dots[i] = job;
        cost += dots_cost(&job, e->block, e->s.parts[i].up.cols);
    }
    if (!area->base || rc != PK_OK) return rc;
    rc = run_parallel(par, panels, e->s.rank * nr / 2, pack_panels, e);
    return rc != PK_OK ? rc : run_parallel(par, (m + e->block - 1) / e->block, cost, product_rows, e);
}

static int product_few(product_job *e, const pk_mat *x, work_area *area, pk_parallel_fn par) {
    const int64_t nr = panel_cols(e), m = e->y->rows, size = acc_size(e->s.wide);
    int64_t p = 0;
    int rc = PK_OK;
    for (int i = 0; !e->ids && i < e->s.nparts && rc == PK_OK; p += e->s.parts[i++].up.cols)
        rc = dots_run(x, &e->s.parts[i].down, area->base ? e->t + p * size : NULL, e->s.rank, e->s.wide, area, par);
    if (!area->base || rc != PK_OK) return rc;
    turn(e, 0, m);
    return run_parallel(par, (e->y->cols + nr - 1) / nr, e->s.rank * nr * (8 + m) / 12, expand_columns, e);
}

/* x: unused with ids */
static int product_start(product_job *e, const pk_mat *x, work_area *area, pk_parallel_fn par) {
    const size_t mark = area->used;
    const pk_mat *const y = e->y;
    e->direct = (y->cs == 1 || y->cols <= 1) && e->s.wide == (y->dtype == PK_F64);
    e->turned = work_take(area, y->rows * e->s.rank * acc_size(e->s.wide));
    e->halves = e->s.pairs ? work_take(area, y->rows * e->s.rank * 2) : NULL;
    e->strips = e->direct && e->s.depth * y->cols * acc_size(e->s.wide) <= STRIPS;
    const int few = y->rows <= FEW_ROWS && !(e->ids && e->strips);
    const int rc = (few ? product_few : product_many)(e, x, area, par);
    area->used = mark;
    return rc;
}

int product_run(const pk_mat *y, const pk_mat *x, const pk_lowrank *parts, int nparts, int wide, row_op op, char *t,
                work_area *area, pk_parallel_fn par) {
    product_job e = {.s = terms_of(y, x, parts, nparts, wide), .y = y, .op = op, .t = t};
    return product_start(&e, x, area, par);
}

/* --------------------------------------------------------------------------------------------------------- forward */

int64_t rank_of(const pk_lowrank *f, int nf) {
    int64_t rank = 0;
    for (int i = 0; i < nf; i++) rank += f[i].down.rows;
    return rank;
}

int factors_fit(const pk_lowrank *f, int nf, int64_t n, int64_t k) {
    if (nf < 0 || (nf > 0 && !f)) return 0;
    for (int i = 0; i < nf; i++)
        if (!mat_valid(&f[i].down) || !mat_valid(&f[i].up) || f[i].down.cols != k || f[i].up.rows != n ||
            f[i].down.rows != f[i].up.cols)
            return 0;
    return 1;
}

static int forward(const pk_mat *y, const pk_mat *x, const pk_lowrank *f, int nf, row_op op, const pk_mat *t,
                   work_area *area, pk_parallel_fn par) {
    const int wide = y->dtype == PK_F64 || x->dtype == PK_F64;
    const int64_t rank = rank_of(f, nf);
    char *const acc = work_take(area, y->rows * rank * acc_size(wide));
    const int rc = rank > 0 || op == OP_SET ? product_run(y, x, f, nf, wide, op, acc, area, par) : PK_OK;
    if (rc == PK_OK && area->base && t && t->data)
        mat_unpack(pk_isa_now(), t, 0, 0, y->rows, rank, acc, rank, 1.0, wide);
    return rc;
}

static int forward_valid(const pk_mat *y, const pk_mat *x, const pk_lowrank *f, int nf) {
    return mat_valid(y) && mat_valid(x) && y->rows == x->rows && factors_fit(f, nf, y->cols, x->cols);
}

size_t pk_lowrank_apply_work(const pk_mat *y, const pk_mat *x, const pk_lowrank *f, int nf) {
    work_area area = {NULL, 0, 0};
    if (!forward_valid(y, x, f, nf)) return 0;
    forward(y, x, f, nf, OP_SET, NULL, &area, NULL);
    return work_total(&area);
}

static int forward_start(const pk_mat *y, const pk_mat *x, const pk_lowrank *f, int nf, row_op op, const pk_mat *t,
                         void *work, pk_parallel_fn par) {
    work_area area = work_start(work);
    if (!forward_valid(y, x, f, nf)) return PK_EINVAL;
    if (t && t->data && (!mat_valid(t) || t->rows != y->rows || t->cols != rank_of(f, nf))) return PK_EINVAL;
    if (y->rows == 0 || (nf == 0 && op == OP_ADD)) return PK_OK;
    return forward(y, x, f, nf, op, t, &area, par);
}

int pk_lowrank_apply(const pk_mat *y, const pk_mat *x, const pk_lowrank *f, int nf, const pk_mat *t, void *work,
                     pk_parallel_fn par) {
    return forward_start(y, x, f, nf, OP_ADD, t, work, par);
}

int pk_lowrank_set(const pk_mat *y, const pk_mat *x, const pk_lowrank *f, int nf, const pk_mat *t, void *work,
                   pk_parallel_fn par) {
    return forward_start(y, x, f, nf, OP_SET, t, work, par);
}

/* -------------------------------------------------------------------------------------------------------- lookups */

static int lookup(const pk_mat *y, const int64_t *ids, const pk_lowrank *f, int nf, work_area *area,
                  pk_parallel_fn par) {
    product_job e = {.s = terms_of(y, NULL, f, nf, y->dtype == PK_F64), .y = y, .ids = ids, .op = OP_ADD};
    return product_start(&e, NULL, area, par);
}

static int lookup_valid(const pk_mat *y, const pk_lowrank *f, int nf) {
    if (!mat_valid(y)) return 0;
    for (int i = 0; i < nf; i++)
        if (!factors_fit(&f[i], 1, y->cols, f[i].down.cols)) return 0;
    return 1;
}

size_t pk_lookup_apply_work(const pk_mat *y, const pk_lowrank *f, int nf) {
    static const int64_t none;
    work_area area = {NULL, 0, 0};
    if (!lookup_valid(y, f, nf)) return 0;
    lookup(y, &none, f, nf, &area, NULL);
    return work_total(&area);
}

int pk_lookup_apply(const pk_mat *y, const int64_t *ids, const pk_lowrank *f, int nf, void *work, pk_parallel_fn par) {
    work_area area = work_start(work);
    if (!lookup_valid(y, f, nf) || (y->rows > 0 && !ids)) return PK_EINVAL;
    if (y->rows == 0 || nf == 0) return PK_OK;
    return lookup(y, ids, f, nf, &area, par);
}
