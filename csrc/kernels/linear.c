/* linear.c: whole linear layers, y = x w^T + bias + terms; the gradient of a layer's input is one of the transposed weight.
 *
 * Few rows go through the dot products of dots.h, which take w as it lies. For more, w is packed panel by panel and
 * multiplied by groups of MR rows of x, and what is needed next is fetched meanwhile. The terms go on in the same sums. */
#include "dots.h"
#include "dtype.h"
#include "lowrank.h"
#include "terms.h"

enum {
    PANEL_WORDS = 256, /* of all panels side by side; sums of so many products are added to what came before */
    WIDE_PANELS = 4,   /* side by side for a w whose rows would be read in short pieces, up to WIDE_ROWS rows of x */
    WIDE_ROWS = 48,
    MORE_PANELS = 2, /* for more rows, up to MORE_ROWS */
    MORE_ROWS = LINEAR_ROWS / MORE_PANELS,
    FEW_UNMEASURED = 16 /* rows */
};

typedef struct {
    const pk_isa *isa;
    const pk_mat *y, *x, *bias; /* bias may be NULL */
    pk_mat w;                   /* (k, n) */
    term_sums terms;
    int pairs; /* a word is two bf16, else a float */
    int64_t panels, depth, words;
    char *
        rows; /* x, as it is or packed: groups of MR rows, `group` words apart; word p of row i is the p * sp + i * si-th */
    int64_t group, sp, si;
    const dots_job *dots; /* few rows, instead of what stands from `pairs` on */
    char *turned;         /* of terms_turn */
} linear_job;

static void pack_rows(int64_t begin, int64_t end, void *ctx) {
    const linear_job *const e = ctx;
    const pk_mat x = mat_transposed(*e->x);
    for (int64_t g = begin; g < end; g++) {
        const int64_t i = g * MR, n = min64(MR, x.cols - i);
        char *const to = e->rows + i * e->words * 4;
        if (e->pairs || x.dtype != PK_F32 || x.rs != 1) {
            words_pack(e->isa, &x, 0, e->words, i, n, to, MR, 0, e->pairs);
            continue;
        }
        for (int64_t q = 0; q < n; q++) {
            const float *const from = (const float *)(const void *)mat_at(&x, 0, i + q);
            for (int64_t p = 0; p < e->words; p++) ((float *)(void *)to)[p * MR + q] = from[p];
        }
    }
}

/* d (m, n), rows ld apart = x w for n columns from j0 on, zeros up to a whole panel */
static void base_panels(const linear_job *e, int64_t j0, int64_t n, float *d, int64_t ld) {
    const int64_t nr = e->isa->nr[0], m = e->y->rows, groups = (m + MR - 1) / MR, each = e->pairs ? 2 : 1;
    _Alignas(64) char panel[PANEL_WORDS * NR_MAX * 4];
    for (int64_t p = 0; p == 0 || p < e->words; p += e->depth) { /* once even for no words: sums of nothing */
        const int64_t np = min64(e->depth, e->words - p);
        for (int64_t j = 0; j < n; j += nr) {
            const int last = j + nr >= n, end = last && p + np >= e->words;
            const int64_t next_p = end ? 0 : last ? p + np : p, next_j = end ? j0 + n : last ? j0 : j0 + j + nr;
            if (n - j < nr) memset(panel, 0, sizeof panel);
            words_pack(e->isa, &e->w, p, np, j0 + j, min64(nr, n - j), panel, nr, 0, e->pairs);
            for (int64_t g = 0; g < groups; g++) {
                const char *const row = e->rows + (g * e->group + p * e->sp) * 4;
                float *const to = d + g * MR * ld + j;
                const int mr = (int)min64(MR, m - g * MR), add = p > 0 ? 2 : 0;
                if (next_j < e->w.cols) mat_fetch(&e->w, next_p * each, e->depth * each, next_j, nr, g, groups);
                words_tile(e->isa, np, row, e->sp, e->si, panel, to, ld, mr, add, 0, e->pairs);
            }
        }
    }
}

static void base_dots(const linear_job *e, int64_t j0, int64_t n, float *d, int64_t ld) {
    const int64_t m = e->y->rows;
    for (int64_t i = 0; n < ld && i < m; i++) memset(d + i * ld, 0, (size_t)ld * 4);
    dots_block(e->dots, 0, m, j0, n, d, ld);
}

/* one panel of d += the terms */
static void add_terms(const linear_job *e, int64_t j, int64_t n, float *d, int64_t ld) {
    const int64_t m = e->y->rows;
    _Alignas(64) char panel[DEPTH * NR_MAX * 4];
    for (int64_t p = 0; p < e->terms.depth; p += DEPTH) {
        const int64_t np = min64(DEPTH, e->terms.depth - p);
        terms_pack(&e->terms, p, np, j, n, panel);
        for (int64_t i = 0; i < m; i += MR)
            terms_tile(&e->terms, np, e->turned + (p * m + i) * 4, m, panel, (char *)(d + i * ld), ld,
                       (int)min64(MR, m - i), 1);
    }
}

static void linear_columns(int64_t begin, int64_t end, void *ctx) {
    const linear_job *const e = ctx;
    const int64_t nr = e->isa->nr[0], block = e->panels * nr, ld = block, m = e->y->rows;
    _Alignas(64) float d[LINEAR_ROWS * NR_MAX];
    _Alignas(64) float bias[WIDE_PANELS * NR_MAX];
    for (int64_t b = begin; b < end; b++) {
        const int64_t j0 = b * block, n = min64(block, e->y->cols - j0);
        (e->dots ? base_dots : base_panels)(e, j0, n, d, ld);
        for (int64_t j = 0; j < n; j += nr) add_terms(e, j0 + j, min64(nr, n - j), d + j, ld);
        if (e->bias) mat_pack(e->isa, e->bias, 0, j0, 1, n, bias, ld, 1.0, 0);
        for (int64_t i = 0; e->bias && i < m; i++)
            e->isa->dtype[PK_F32].apply(OP_ADD, d + i * ld, bias, d + i * ld, n);
        mat_unpack(e->isa, e->y, 0, j0, m, n, d, ld, 1.0, 0);
    }
}

/* t (m, rank) = x A^T, and the same in `turned` */
static int shrink_terms(linear_job *e, char *t, work_area *area, pk_parallel_fn par) {
    const int64_t m = e->y->rows;
    char *const halves = e->terms.pairs ? work_take(area, m * e->terms.rank * 2) : NULL;
    int rc = PK_OK;
    for (int64_t f = 0, p = 0; f < e->terms.nparts && rc == PK_OK; p += e->terms.parts[f++].up.cols)
        rc = dots_run(e->x, &e->terms.parts[f].down, area->base ? t + p * 4 : NULL, e->terms.rank, 0, area, par);
    if (area->base && rc == PK_OK) terms_turn(&e->terms, t, m, halves, e->turned);
    return rc;
}

static int takes_pairs(const pk_mat *x, const pk_mat *w) {
    return pk_isa_now()->pairs && x->dtype == PK_BF16 && w->dtype == PK_BF16;
}

/* Are the rows of x words as they lie? */
static int takes_rows(const pk_mat *x, const pk_mat *w) {
    return takes_pairs(x, w) && x->cs == 1 && x->rs % 2 == 0 && x->cols % 2 == 0 && (uintptr_t)x->data % 4 == 0;
}

static int linear(const pk_mat *y, const pk_mat *x, const pk_mat *w, const pk_mat *bias, const pk_lowrank *f, int nf,
                  const pk_mat *t, int few, work_area *area, pk_parallel_fn par) {
    const int64_t m = y->rows, nr = pk_isa_now()->nr[0], groups = (m + MR - 1) / MR;
    linear_job e = {.isa = pk_isa_now(),
                    .y = y,
                    .x = x,
                    .w = mat_transposed(*w),
                    .terms = terms_of(y, x, f, nf, 0),
                    .panels = NR_MAX / nr};
    dots_job dots;
    int rc = PK_OK;
    e.bias = bias && bias->data ? bias : NULL;
    e.turned = work_take(area, m * e.terms.rank * 4);
    char *const acc = work_take(area, m * e.terms.rank * 4);
    if (few) {
        rc = dots_prepare(&dots, x, w, 0, area, par);
        e.dots = &dots;
    } else {
        e.pairs = takes_pairs(x, w);
        e.words = e.pairs ? (x->cols + 1) / 2 : x->cols;
        const int across = w->rs != 1 || m > MORE_ROWS ? 1 : m <= WIDE_ROWS ? WIDE_PANELS : MORE_PANELS;
        e.panels *= across;
        e.depth = PANEL_WORDS / across;
        if (takes_rows(x, w)) {
            e.rows = x->data;
            e.group = MR * x->rs / 2;
            e.sp = 1;
            e.si = x->rs / 2;
        } else {
            e.rows = work_take(area, groups * MR * e.words * 4);
            e.group = MR * e.words;
            e.sp = MR;
            e.si = 1;
            if (area->base) rc = run_parallel(par, groups, MR * e.words, pack_rows, &e);
        }
    }
    if (rc == PK_OK) rc = shrink_terms(&e, acc, area, par);
    if (rc != PK_OK || !area->base) return rc;
    if (t && t->data) mat_unpack(e.isa, t, 0, 0, m, e.terms.rank, acc, e.terms.rank, 1.0, 0);
    const int64_t block = e.panels * nr;
    return run_parallel(par, (y->cols + block - 1) / block, (e.terms.rank + x->cols) * block * (8 + m) / 12,
                        linear_columns, &e);
}

static int linear_valid(const pk_mat *y, const pk_mat *x, const pk_mat *w, const pk_lowrank *f, int nf) {
    return mat_valid(y) && mat_valid(x) && y->rows == x->rows && factors_fit(f, nf, y->cols, x->cols) &&
           mat_valid(w) && w->rows == y->cols && w->cols == x->cols && y->dtype != PK_F64 && x->dtype != PK_F64 &&
           w->dtype != PK_F64;
}

/* Do m rows go through the dot products? Only if these take w as it is. */
static int are_few(const pk_mat *w, int64_t m) {
    return m <= pk_isa_now()->few[w->dtype] && (w->cs == 1 || w->cols <= 1);
}

/* Rows at once: even shares. */
static int64_t linear_step(const pk_mat *x, const pk_mat *w) {
    const int64_t most = takes_rows(x, w) ? LINEAR_ROWS : PACKED_ROWS, m = x->rows, parts = (m + most - 1) / most;
    return max64(1, round_up((m + parts - 1) / max64(parts, 1), MR));
}

size_t pk_linear_work(const pk_mat *y, const pk_mat *x, const pk_mat *w, const pk_lowrank *f, int nf) {
    work_area area = {NULL, 0, 0};
    if (!linear_valid(y, x, w, f, nf)) return 0;
    const int64_t m = min64(y->rows, linear_step(x, w));
    const pk_mat ym = mat_rows(*y, 0, m), xm = mat_rows(*x, 0, m);
    linear(&ym, &xm, w, NULL, f, nf, NULL, are_few(w, y->rows), &area, NULL);
    return work_total(&area);
}

int pk_linear(const pk_mat *y, const pk_mat *x, const pk_mat *w, const pk_mat *bias, const pk_lowrank *f, int nf,
              const pk_mat *t, void *work, pk_parallel_fn par) {
    int rc = PK_OK;
    if (!linear_valid(y, x, w, f, nf)) return PK_EINVAL;
    if (bias && bias->data && (!mat_valid(bias) || bias->rows != 1 || bias->cols != y->cols)) return PK_EINVAL;
    if (t && t->data && (!mat_valid(t) || t->rows != y->rows || t->cols != rank_of(f, nf))) return PK_EINVAL;
    const int64_t step = linear_step(x, w);
    for (int64_t i = 0; i < y->rows && rc == PK_OK; i += step) {
        const int64_t m = min64(step, y->rows - i);
        const pk_mat none = {0}, ym = mat_rows(*y, i, m), xm = mat_rows(*x, i, m), tm = mat_rows(t ? *t : none, i, m);
        work_area area = work_start(work);
        rc = linear(&ym, &xm, w, bias, f, nf, &tm, are_few(w, y->rows), &area, par);
    }
    return rc;
}

/* Where pk_linear takes less time than torch 2.13, whose F.linear is MKL's for f32 and oneDNN's for bf16, with the terms of
 * r = 16 added afterwards (pk_lowrank_apply). Microseconds out of the cache on 2 threads of Zen 4, pk_linear / torch:
 *
 *   rows               1        8         16         32         48         64        128        256          512
 *   f32  2816 x 1024  213/652  434/1177  629/1443  1117/2108  1634/2706  2172/3432  3882/5857  7707/9762   15150/17458
 *        1024 x 2816  223/634  395/1088  581/1315  1037/2005  1456/2546  2107/3229  3885/5578  7876/9362   15554/16570
 *        1024 x 1024   73/230  148/402   215/498    393/768    550/998    819/1218  1492/2034  2991/3524    5899/6186
 *         256 x 256     6/14    13/29     23/46      40/69      55/92      83/116    148/143    298/259      588/448
 *   bf16 2816 x 1024  117/387  194/496   322/613    585/870    838/918   1032/1300  1902/2164  3731/3926    7339/7796
 *        1024 x 2816  107/374  211/358   308/462    544/675    752/876    985/1084  1840/1922  3669/3647    7084/7164
 *        1024 x 1024   50/131   80/161   130/244    227/349    318/428    386/502    702/758   1342/1372    2670/2713
 *         256 x 256     4/24     9/28     14/33      25/42      35/47      32/52      58/81     109/132      215/229
 *   f16  2816 x 1024  150/170  300/1125  531/2215  1033/4345  1506/6417  1996/8586  4026/17088 7864/34341  15629/68676
 *
 * and for the gradient, g w (for no terms) / torch's g @ w:
 *
 *   f32  2816 x 1024  497/770  646/1937  792/1487  1210/1948  2066/2860  3803/4677  5526/6522  7700/8478  15181/15771
 *        1024 x 2816  402/572  489/1314  754/1678  1237/2141  2038/3131  3721/5023  5490/6818  7507/8606  15194/16838
 *         256 x 256    10/6     20/20     39/29      64/49      72/84     128/113    169/197                515/397
 *   bf16 2816 x 1024  360/459  339/530   507/783    672/858   1155/1289  2061/2124  2876/2907  4013/3823   7600/7212
 *        1024 x 2816  302/385  309/504   421/566    661/772   1103/1153  2002/2012  2791/2857  3841/3721   7491/7181
 *         256 x 256    10/22    16/25     23/30      34/40      39/47      65/79      98/97                 272/184
 *   f16: torch takes 20 to 200 times as long.
 *
 * On 2 threads of Zen 5, bf16, torch with the terms; gradients vary by a third with where the pages lie:
 *
 *   rows                  8         16        32        64         128        192        256         512
 *   y    2816 x 1024   205/347   302/423   384/401   573/569   1002/1181  1351/1541  1802/1960   3469/3880
 *        1024 x 2816   208/273   266/318   358/359   577/560    944/934   1363/1297  1804/1716   3333/3379
 *        1024 x 1024    74/98    106/114   135/156   212/222    361/371    518/508    665/652    1231/1272
 *   g w  1024 x 1024   121/140   133/160   148/200   225/274    474/417    499/546    775/698    1358/1339
 *
 * y on Zen 4 again with AVX2 alone, for which oneDNN has no product of bf16 or f16:
 *
 *   rows               1        8         16         32         48         64        128        256          512
 *   f32  2816 x 1024  210/643  484/1199  780/1464  1228/2093  1631/2696  2081/3352  3949/5914  7796/9931   15412/17983
 *        1024 x 2816  190/627  477/1068  802/1331  1272/2024  1688/2602  2175/3186  4112/5590  8214/9437   16180/16713
 *        1024 x 1024   70/226  164/423   314/515    485/781    640/998    820/1226  1546/2086  3084/3648    6096/6359
 *         256 x 256     6/13    12/28     33/45      48/66      63/89      82/108    149/144    302/246      606/455
 *   bf16 2816 x 1024  131/163  312/1122  559/2224  1054/4367  1539/6465  2275/8588  4266/17147 8439/34418  18759/72298
 *        1024 x 1024   53/66   117/437   209/817    388/1602   570/2360   774/3132  1461/6168  2907/12372   5925/24979
 *         256 x 256     4/12    11/44     18/80      34/151     48/219     74/290    133/572    267/1130     523/2249
 *   f16  2816 x 1024  148/166  316/1116  571/2237  1095/4409  1611/6515  2298/8700  4375/17214 8750/34317  18284/69561
 *        1024 x 1024   47/64   118/432   211/808    398/1588   580/2343   777/3142  1481/6196  2938/12399   5806/24741
 *         256 x 256     4/12    11/44     19/80      34/152     48/216     75/287    135/572    268/1130     529/2248
 *
 * and g w on 2 threads of Zen 3, which has no more than AVX2:
 *
 *   f32  2816 x 1024  798/543 1075/1498  1224/1680  1837/2343  2894/4031  5181/6637  8299/8803 12350/11654   22352/20600
 *        1024 x 2816 1041/467 1364/2016  1236/1877  1919/2494  2809/3899  4849/6482  8195/8811 11466/11492   22391/21855
 *        1024 x 1024  288/238  368/487    616/679    924/1044  1309/1687  1930/2729  2750/3594  5586/4252    11472/11437
 *         256 x 256    29/9     39/25      49/30     108/86     110/98     200/169               280/230       489/387
 *   bf16: torch takes 6 times as long for one row, 40 for 8, 120 for 128.
 *
 * Measured on AMD's processors only; on others it is taken where reading the weight once is what counts. For a small
 * weight the calls are most of the time, and torch's bits are worth more than the rest. */
static int64_t linear_limit(pk_dtype dtype, int large) {
    const pk_isa *const isa = pk_isa_now();
    const int is_wide = isa->nr[0] == NR_MAX, is_measured = pk_cpu_is_measured();
    if (dtype == PK_F64 || (!is_wide && !isa->takes_halves)) return 0;
    if (dtype == PK_F32) return !is_measured ? FEW_UNMEASURED : is_wide ? (large ? 512 : 64) : large ? 256 : 192;
    if (isa->takes_halves) return INT64_MAX;
    if (dtype == PK_BF16 && isa->pairs) return !is_measured ? FEW_UNMEASURED : large ? 512 : 128;
    return 0;
}

int pk_linear_suits(pk_dtype dtype, int64_t m, int64_t n, int64_t k) {
    if (n * k < SMALL_WEIGHT) return 0;
    if (dtype == PK_F16 && pk_isa_now()->nr[0] == NR_MAX) return 1;
    return m <= linear_limit(dtype, n * k >= LARGE_WEIGHT);
}

int pk_linear_grad_suits(pk_dtype dtype, int64_t m, int64_t n, int64_t k) {
    const pk_isa *const isa = pk_isa_now();
    const int is_wide = isa->nr[0] == NR_MAX;
    if (dtype == PK_F16 || (dtype == PK_BF16 && isa->takes_halves)) return is_wide || isa->takes_halves;
    return n * k >= LARGE_WEIGHT && m <= linear_limit(dtype, is_wide) && (m > 1 || is_wide);
}
