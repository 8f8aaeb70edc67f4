/* merge.c: merge, unmerge and switch, made of passes of the engine. */
#include <string.h>

#include "engine.h"

static int delta_valid(const pk_mat *w, const pk_delta *d) {
    if (!d) return 0;
    if (d->law == PK_DELTA) return mat_valid(&d->full) && d->full.rows == w->rows && d->full.cols == w->cols;
    if (d->law != PK_LOWRANK || d->nf < 0 || (d->nf > 0 && !d->factors)) return 0;
    for (int i = 0; i < d->nf; i++) {
        const pk_mat *const a = &d->factors[i].down, *const b = &d->factors[i].up;
        if (!mat_valid(a) || !mat_valid(b) || a->cols != w->cols || b->rows != w->rows || a->rows != b->cols) return 0;
    }
    return 1;
}

static size_t delta_work(const pk_mat *w, const pk_delta *d) {
    int64_t rank = 0;
    if (!d || d->law != PK_LOWRANK) return 0;
    for (int i = 0; i < d->nf; i++) rank += d->factors[i].down.rows;
    return (size_t)((w->rows + w->cols + 2 * NR_MAX) * rank * acc_size(w->dtype == PK_F64)) + 128;
}

size_t pk_merge_work(const pk_mat *w, const pk_delta *old, const pk_delta *new_) {
    const size_t size = delta_work(w, old) + delta_work(w, new_);
    return size ? size + 64 : 0;
}

/* along which direction the weight is walked */
static int walk_transposed(const pk_mat *w) {
    if (w->cs == 1 && w->cols > 1) return 0;
    if (w->rs == 1 && w->rows > 1) return 1;
    return w->cols < w->rows && w->cols < NR_MAX;
}

size_t pk_record_bound(const pk_mat *w) {
    engine_job job;
    engine_setup(&job, w, walk_transposed(w));
    return sizeof(record_head) + (size_t)engine_units(&job) * sizeof(unit_entry) +
           (size_t)(w->rows * w->cols * pk_dtype_size(w->dtype));
}

/* Readies the record that the job writes; 0 if not even the table fits. */
static int record_open(engine_job *job, pk_record *record) {
    const size_t fixed = sizeof(record_head) + (size_t)engine_units(job) * sizeof(unit_entry);
    record->size = 0;
    if (!record->data || record->capacity < fixed) return 0;
    memset(record->data, 0, fixed);
    job->out = record;
    job->room = record->capacity - fixed;
    atomic_store(&job->used, 0);
    return 1;
}

static void record_close(const engine_job *job, const pk_delta *d, pk_record *record) {
    record_head head;
    memset(&head, 0, sizeof head);
    head.dtype = (int32_t)job->w.dtype;
    head.law = (int32_t)d->law;
    head.math = source_math(job->isa, &job->w, d);
    head.transposed = job->transposed;
    head.rows = job->w.rows;
    head.cols = job->w.cols;
    head.units = engine_units(job);
    head.used = atomic_load(&job->used);
    head_set(record->data, &head);
    record->size = sizeof head + (size_t)head.units * sizeof(unit_entry) + head.used;
}

/* Is it a record of this weight? Then *head is its head. */
static int record_fits(const pk_mat *w, const pk_record *record, record_head *head) {
    if (!record || !head_get(record, head) || head->dtype != (int32_t)w->dtype) return 0;
    engine_job job;
    engine_setup(&job, w, head->transposed != 0);
    return head->rows == job.w.rows && head->cols == job.w.cols && head->units == engine_units(&job);
}

/* Sets the job up to undo d with record, or plainly if the record does not fit (then changed). Returns d's math. */
static int setup_undo(engine_job *job, const pk_mat *w, const pk_delta *d, const pk_record *record) {
    record_head head;
    const int fits = record_fits(w, record, &head) && head.law == (int32_t)d->law;
    const int wanted = fits ? head.math : 0;
    const pk_isa *const isa = !fits || d->law != PK_LOWRANK ? pk_isa_now() : pk_isa_with_math(wanted);
    engine_setup(job, w, fits ? head.transposed != 0 : walk_transposed(w));
    if (fits && isa && (wanted != MATH_PAIRS || source_math(isa, w, d) == MATH_PAIRS)) {
        job->isa = isa;
        job->in = record;
        job->in_head = head;
    }
    job->changed = record && !job->in;
    return job->in ? wanted : source_math(job->isa, w, d);
}

/* The merge stopped: restores the units it wrote from what it recorded. */
static int take_back(engine_job *job, const delta_source *s, pk_record *record, pk_parallel_fn par) {
    engine_job undo;
    const pk_mat w = job->transposed ? mat_transposed(job->w) : job->w;
    engine_setup(&undo, &w, job->transposed);
    undo.isa = job->isa;
    undo.old = s;
    undo.in = undo.out = record;
    undo.in_head.units = engine_units(job);
    undo.in_head.used = job->room;
    const int rc = engine_run(&undo, par);
    return rc != PK_OK ? rc : atomic_load(&job->status);
}

int pk_merge(const pk_mat *w, const pk_delta *d, unsigned flags, pk_record *record, void *work, pk_parallel_fn par) {
    engine_job job;
    delta_source s;
    work_area area = work_start(work);
    if (!mat_valid(w) || !delta_valid(w, d)) return PK_EINVAL;
    engine_setup(&job, w, walk_transposed(w));
    if (record && !record_open(&job, record)) return PK_FULL_RECORD;
    int rc = source_prepare(&s, &job, d, source_math(job.isa, w, d), &area, par);
    if (rc != PK_OK) return rc;
    job.new_ = &s;
    job.check = (flags & PK_CHECK) != 0;
    if (job.check && !record) {
        job.dry = 1;
        rc = engine_run(&job, par);
        if (rc != PK_OK) return rc;
        job.dry = job.check = 0;
    }
    rc = engine_run(&job, par);
    if (rc > PK_OK && record) return take_back(&job, &s, record, par);
    if (rc == PK_OK && record) record_close(&job, d, record);
    return rc;
}

int pk_unmerge(const pk_mat *w, const pk_delta *d, const pk_record *record, void *work, pk_parallel_fn par) {
    engine_job job;
    delta_source s;
    work_area area = work_start(work);
    if (!mat_valid(w) || !delta_valid(w, d)) return PK_EINVAL;
    if (!record) { /* w - delta: a merge of the negative */
        pk_delta negative = *d;
        negative.alpha = -d->alpha;
        return pk_merge(w, &negative, 0, NULL, work, par);
    }
    const int math = setup_undo(&job, w, d, record);
    int rc = source_prepare(&s, &job, d, math, &area, par);
    if (rc != PK_OK) return rc;
    job.old = &s;
    rc = engine_run(&job, par);
    return rc == PK_OK && job.changed ? PK_CHANGED : rc;
}

int pk_switch(const pk_mat *w, const pk_delta *old, const pk_record *old_record, const pk_delta *new_, unsigned flags,
              pk_record *record, void *work, pk_parallel_fn par) {
    engine_job job;
    delta_source from, to;
    work_area area = work_start(work);
    if (!mat_valid(w) || !delta_valid(w, old) || !delta_valid(w, new_)) return PK_EINVAL;
    const int math = setup_undo(&job, w, old, old_record);
    if (record && !record_open(&job, record)) return PK_FULL_RECORD;
    int rc = source_prepare(&from, &job, old, math, &area, par);
    if (rc == PK_OK) rc = source_prepare(&to, &job, new_, source_math(job.isa, w, new_), &area, par);
    if (rc != PK_OK) return rc;
    job.old = &from;
    job.new_ = &to;
    job.check = (flags & PK_CHECK) != 0;
    if (job.check || (record && record->capacity < pk_record_bound(w))) {
        job.dry = 1;
        rc = engine_run(&job, par);
        if (rc != PK_OK) return rc;
        job.dry = job.check = 0;
        if (record) record_open(&job, record);
    }
    rc = engine_run(&job, par);
    if (rc == PK_OK && record) record_close(&job, new_, record);
    return rc == PK_OK && job.changed ? PK_CHANGED : rc;
}
