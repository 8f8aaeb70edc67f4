/* source.c: makes a delta ready for the engine: packs its factors. */
#include "dtype.h"
#include "engine.h"
#include "words.h"

typedef struct {
    const engine_job *job;
    const delta_source *s;
} pack_job;

/* The factor along the walk's rows (panels) and across them; turned, up and down swap. */
static pk_mat along(const engine_job *job, const pk_lowrank *f) {
    return job->transposed ? mat_transposed(f->up) : f->down;
}

static pk_mat across(const engine_job *job, const pk_lowrank *f) {
    return job->transposed ? f->down : mat_transposed(f->up);
}

/* always goes into up, so that both directions of the walk give the same bits */
static double scale_of(const delta_source *s, const pk_lowrank *f) {
    return f->scale * s->d->alpha;
}

/* Of bf16 it changes nothing but the exponents: B is multiplied by it, not the sums. */
static int is_power_of_two(float scale) {
    const uint32_t bits = f32_bits(scale), exponent = bits >> 23 & 0xff;
    return (bits & 0x7fffff) == 0 && exponent > 0 && exponent < 0xff;
}

static uint32_t scaled_pair(uint32_t pair, float scale) {
    const uint32_t low = f32_bits(f32_of(pair << 16) * scale), high = f32_bits(f32_of(pair & 0xffff0000u) * scale);
    return low >> 16 | (high & 0xffff0000u);
}

static void pack_pairs(const pk_isa *isa, const pk_mat *a, int64_t j, int64_t nj, void *to, int64_t ld, double scale) {
    const int64_t words = words_of(a->rows, 1);
    const int is_scaled = scale != 1 && is_power_of_two((float)scale);
    uint32_t *pair = to;
    words_pack(isa, a, 0, words, j, nj, to, ld, 0, 1);
    for (int64_t p = 0; is_scaled && p < words; p++, pair += ld)
        for (int64_t i = 0; i < nj; i++) pair[i] = scaled_pair(pair[i], (float)scale);
}

static int64_t depth_of(const delta_source *s, const pk_mat *a) {
    return words_of(a->rows, s->pairs);
}

static void pack_panels(int64_t begin, int64_t end, void *ctx) {
    const pack_job *const p = ctx;
    const engine_job *const job = p->job;
    const int64_t nr = job->isa->nr[job->wide], size = acc_size(job->wide), rank = p->s->rank;
    for (int64_t j = begin; j < end; j++) {
        char *to = p->s->panels + j * nr * rank * size;
        const int64_t n = min64(nr, job->w.cols - j * nr);
        if (n < nr) memset(to, 0, (size_t)(nr * rank * size));
        for (int i = 0; i < p->s->d->nf; i++) {
            const pk_lowrank *const f = &p->s->d->factors[i];
            const pk_mat a = along(job, f);
            const double scale = job->transposed ? scale_of(p->s, f) : 1.0;
            if (p->s->pairs)
                pack_pairs(job->isa, &a, j * nr, n, to, nr, scale);
            else
                mat_pack(job->isa, &a, 0, j * nr, a.rows, n, to, nr, scale, job->wide);
            to += depth_of(p->s, &a) * nr * size;
        }
    }
}

static void pack_groups(int64_t begin, int64_t end, void *ctx) {
    const pack_job *const p = ctx;
    const engine_job *const job = p->job;
    const int64_t size = acc_size(job->wide), rank = p->s->rank;
    for (int64_t g = begin; g < end; g++) {
        char *to = p->s->rows + g * ROW_GROUP * rank * size;
        const int64_t n = min64(ROW_GROUP, job->w.rows - g * ROW_GROUP);
        for (int i = 0; i < p->s->d->nf; i++) {
            const pk_lowrank *const f = &p->s->d->factors[i];
            const pk_mat b = across(job, f);
            const double scale = job->transposed ? 1.0 : scale_of(p->s, f);
            if (p->s->pairs)
                pack_pairs(job->isa, &b, g * ROW_GROUP, n, to, ROW_GROUP, scale);
            else
                mat_pack(job->isa, &b, 0, g * ROW_GROUP, b.rows, n, to, ROW_GROUP, scale, job->wide);
            to += depth_of(p->s, &b) * ROW_GROUP * size;
        }
    }
}

int source_math(const pk_isa *isa, const pk_mat *w, const pk_delta *d) {
    enum { PAIRS_FROM = 4 }; /* below that rank the fused f32 micro-kernel is as fast */
    if (d->law != PK_LOWRANK) return MATH_PLAIN;
    int64_t rank = 0;
    int pairs = isa->pairs && w->dtype == PK_BF16;
    for (int i = 0; i < d->nf; i++) {
        const pk_lowrank *const f = &d->factors[i];
        rank += f->down.rows;
        pairs = pairs && f->down.dtype == PK_BF16 && f->up.dtype == PK_BF16 && f->scale == d->factors[0].scale;
    }
    return pairs && rank >= PAIRS_FROM ? MATH_PAIRS : isa->math;
}

int source_prepare(delta_source *s, const engine_job *job, const pk_delta *d, int math, work_area *area,
                   pk_parallel_fn par) {
    memset(s, 0, sizeof *s);
    s->d = d;
    if (d->law != PK_LOWRANK) {
        s->full = job->transposed ? mat_transposed(d->full) : d->full;
        return PK_OK;
    }
    s->pairs = math == MATH_PAIRS;
    const float scale = s->pairs ? (float)scale_of(s, &d->factors[0]) : 1.0f;
    s->scale = is_power_of_two(scale) ? 1.0f : scale;
    for (int i = 0; i < d->nf; i++) s->rank += depth_of(s, &d->factors[i].down);
    const int64_t size = acc_size(job->wide), nr = job->isa->nr[job->wide];
    s->panels = work_take(area, round_up(job->w.cols, NR_MAX) * s->rank * size);
    s->rows = work_take(area, round_up(job->w.rows, ROW_GROUP) * s->rank * size);
    pack_job p = {job, s};
    const int rc = run_parallel(par, (job->w.cols + nr - 1) / nr, nr * s->rank / 4, pack_panels, &p);
    if (rc != PK_OK) return rc;
    return run_parallel(par, (job->w.rows + ROW_GROUP - 1) / ROW_GROUP, ROW_GROUP * s->rank / 4, pack_groups, &p);
}
