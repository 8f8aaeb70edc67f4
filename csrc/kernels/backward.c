/* backward.c: the products of a low-rank term's backward. */
#include "dots.h"
#include "dtype.h"
#include "lowrank.h"
#include "words.h"

enum { OUTER_ROWS = 48, OUTER_DEPTH = 64, TURNED_ROWS = 64 /* even */ };

/* out (r, c) = scale * u^T x, u (m, r) acc with rows ldu apart, x (m, c). Summed in words of one row of both, or of two
 * rows of bf16 (pk_isa.pairs) where x and out are: then u is rounded to bf16, as torch's is. */
typedef struct {
    const pk_isa *isa;
    pk_mat out, x;
    const char *u;
    int64_t ldu;
    double scale;
    int wide, pairs;
    char *words; /* u, or as pairs (m / 2, r); rows ldw apart */
    int64_t ldw;
} outer_job;

static void outer_words(int64_t begin, int64_t end, void *ctx) {
    const outer_job *const o = ctx;
    const int64_t r = o->out.rows;
    uint16_t halves[TURNED_ROWS * OUTER_ROWS];
    for (int64_t b = begin; b < end; b++) {
        const int64_t i0 = b * TURNED_ROWS, m = min64(TURNED_ROWS, o->x.rows - i0);
        for (int64_t r0 = 0; r0 < r; r0 += OUTER_ROWS) {
            const int64_t rows = min64(OUTER_ROWS, r - r0);
            const pk_mat part = {halves, m, rows, rows, 1, PK_BF16};
            for (int64_t i = 0; i < m; i++)
                o->isa->dtype[PK_BF16].apply(OP_SET, halves, o->u + ((i0 + i) * o->ldu + r0) * 4, halves + i * rows,
                                             rows);
            words_pack(o->isa, &part, 0, words_of(m, 1), 0, rows, o->words + (i0 / 2 * r + r0) * 4, r, 0, 1);
        }
    }
}

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
    const int64_t nr = o->isa->nr[o->wide], size = acc_size(o->wide), r = o->out.rows, each = o->pairs ? 2 : 1;
    const int64_t depth = words_of(o->x.rows, o->pairs);
    _Alignas(64) char panel[OUTER_DEPTH * NR_MAX * 4];
    _Alignas(64) char d[OUTER_ROWS * NR_MAX * 4];
    for (int64_t j = begin; j < end; j++) {
        const int64_t n = min64(nr, o->out.cols - j * nr);
        if (n < nr) memset(panel, 0, sizeof panel);
        for (int64_t r0 = 0; r0 < r; r0 += OUTER_ROWS) {
            const int64_t rows = min64(OUTER_ROWS, r - r0);
            for (int64_t p = 0; p == 0 || p < depth; p += OUTER_DEPTH) { /* once even for no rows: sums of nothing */
                const int64_t np = min64(OUTER_DEPTH, depth - p);
                const int next = p + OUTER_DEPTH < depth;
                words_pack(o->isa, &o->x, p, np, j * nr, n, panel, nr, o->wide, o->pairs);
                for (int64_t i = 0; i < rows; i += MR) {
                    if (o->x.cs == 1 && (next || (j + 1) * nr < o->x.cols))
                        mat_fetch(&o->x, next ? (p + OUTER_DEPTH) * each : 0, OUTER_DEPTH * each,
                                  (next ? j : j + 1) * nr, nr, i / MR, (rows + MR - 1) / MR);
                    words_tile(o->isa, np, o->words + (p * o->ldw + r0 + i) * size, o->ldw, 1, panel,
                               d + i * nr * size, nr, (int)min64(MR, rows - i), p > 0, o->wide, o->pairs);
                }
            }
            outer_put(o, r0, j * nr, rows, n, d);
        }
    }
}

static int outer(const pk_mat *out, char *u, int64_t ldu, const pk_mat *x, double scale, int wide, work_area *area,
                 pk_parallel_fn par) {
    outer_job o = {.isa = pk_isa_now(), .out = *out, .x = *x, .u = u, .ldu = ldu, .scale = scale, .wide = wide};
    const int64_t nr = o.isa->nr[wide], m = x->rows, r = out->rows;
    const size_t mark = area->used;
    int rc = PK_OK;
    o.pairs = o.isa->pairs && !wide && x->dtype == PK_BF16 && out->dtype == PK_BF16;
    o.words = o.pairs ? work_take(area, words_of(m, 1) * r * 4) : u;
    o.ldw = o.pairs ? r : ldu;
    area->used = mark;
    if (!area->base) return PK_OK;
    if (o.pairs) rc = run_parallel(par, (m + TURNED_ROWS - 1) / TURNED_ROWS, TURNED_ROWS * r / 4, outer_words, &o);
    if (rc != PK_OK) return rc;
    return run_parallel(par, (out->cols + nr - 1) / nr, m * nr * (r + 8) / 12, outer_range, &o);
}

/* The rows of `a` as acc in *out, *ld apart: where they lie, or copied. */
static void acc_rows(const pk_mat *a, int wide, work_area *area, char **out, int64_t *ld) {
    const int as_is = a->dtype == (wide ? PK_F64 : PK_F32) && a->cs == 1;
    char *const copy = work_take(area, a->rows * a->cols * acc_size(wide));
    *out = as_is ? a->data : copy;
    *ld = as_is ? a->rs : a->cols;
    if (area->base && !as_is) mat_pack(pk_isa_now(), a, 0, 0, a->rows, a->cols, copy, a->cols, 1.0, wide);
}

static int backward(const pk_backward *q, work_area *area, pk_parallel_fn par) {
    const pk_mat *const a = &q->factor.down;
    const int wide = q->g.dtype == PK_F64 || q->x.dtype == PK_F64 || (q->dx.data && q->dx.dtype == PK_F64);
    const int64_t m = q->g.rows, r = a->rows, bytes = m * r * acc_size(wide);
    const pk_lowrank part = {mat_transposed(q->factor.up), mat_transposed(*a), q->factor.scale};
    char *u, *t;
    int64_t ldu = r, ldt = r;
    int rc = PK_OK;
    if (q->dx.data || q->da.data) {
        if (q->u.data && !q->dx.data) {
            acc_rows(&q->u, wide, area, &u, &ldu);
        } else {
            u = work_take(area, bytes);
            if (q->dx.data)
                rc = product_run(&q->dx, &q->g, &part, 1, wide, q->dx_add ? OP_ADD : OP_SET, u, area, par);
            else
                rc = dots_run(&q->g, &part.down, u, r, wide, area, par);
        }
        if (rc == PK_OK && q->da.data) rc = outer(&q->da, u, ldu, &q->x, q->factor.scale, wide, area, par);
    }
    if (rc == PK_OK && q->db.data) {
        const pk_mat dbt = mat_transposed(q->db);
        if (q->t.data) {
            acc_rows(&q->t, wide, area, &t, &ldt);
        } else {
            t = work_take(area, bytes);
            rc = dots_run(&q->x, a, t, r, wide, area, par);
        }
        if (rc == PK_OK) rc = outer(&dbt, t, ldt, &q->g, q->factor.scale, wide, area, par);
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
    return factors_fit(&q->factor, 1, n, k) && shaped(&q->x, m, k) && shaped(&q->t, m, r) && shaped(&q->u, m, r) &&
           shaped(&q->dx, m, k) && shaped(&q->da, r, k) && shaped(&q->db, n, r) && (!need_x || q->x.data);
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
