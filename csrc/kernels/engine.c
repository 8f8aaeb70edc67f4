/* engine.c: the pass over a weight, unit by unit. */
#include "engine.h"

#include <string.h>

#include "dtype.h"

typedef struct {
    int64_t id, r0, c0, rows, cols;
} unit_place;

/* bits of a unit: the weight's own, or a copy */
typedef struct {
    char *p;
    int64_t ld; /* in elements */
} block;

/* What a thread works with. at .. end: what it has of the arena and has not filled. */
typedef struct {
    _Alignas(64) char delta[MR * SEGMENT * 8];
    _Alignas(64) char bits[UNIT_SIZE * 8];
    unsigned char code[CODE_MAX + CODE_SLACK + UNIT_SIZE * 8];
    uint64_t at, end;
} unit_buffers;

/* A pass over a unit: the delta is added or subtracted. With a trace, adding codes what subtracting would miss, and
 * subtracting is corrected by the code. */
typedef struct {
    const engine_job *job;
    const delta_source *source;
    row_op op;       /* OP_ADD or OP_SUB */
    pk_trace *trace; /* or NULL */
    char *delta;     /* room for one of MR segments */
} pass;

void engine_setup(engine_job *job, const pk_mat *w, int transposed) {
    memset(job, 0, sizeof *job);
    job->isa = pk_isa_now();
    job->w = transposed ? mat_transposed(*w) : *w;
    job->transposed = transposed;
    job->wide = w->dtype == PK_F64;
    job->direct = job->w.cs == 1 || job->w.cols <= 1;
    const int64_t padded = round_up(max64(job->w.cols, 1), NR_MAX);
    job->unit_cols = UNIT_COLS;
    job->unit_rows = MR * max64(1, UNIT_COLS / padded);
    job->row_units = (job->w.rows + job->unit_rows - 1) / job->unit_rows;
    job->col_units = (job->w.cols + UNIT_COLS - 1) / UNIT_COLS;
    job->chunk = job->col_units;
}

int64_t engine_units(const engine_job *job) {
    return job->row_units * job->col_units;
}

/* the i-th unit in walking order: column chunks outside, then rows, then the units of a chunk */
static unit_place place_of(const engine_job *job, int64_t i) {
    const int64_t c = i / (job->row_units * job->chunk), width = min64(job->chunk, job->col_units - c * job->chunk);
    const int64_t rest = i - c * job->row_units * job->chunk, row = rest / width;
    const int64_t col = c * job->chunk + rest % width;
    unit_place u;
    u.id = row * job->col_units + col;
    u.r0 = row * job->unit_rows;
    u.c0 = col * job->unit_cols;
    u.rows = min64(job->unit_rows, job->w.rows - u.r0);
    u.cols = min64(job->unit_cols, job->w.cols - u.c0);
    return u;
}

static int64_t element_size(const engine_job *job) {
    return pk_dtype_size(job->w.dtype);
}

static char *block_at(const engine_job *job, block b, int64_t i, int64_t j) {
    return b.p + (i * b.ld + j) * element_size(job);
}

/* up to MR rows of a unit and its low-rank delta from row i, column j on */
static pk_strip strip_at(const pass *a, const unit_place *u, block w, int64_t i, int64_t j) {
    const engine_job *const job = a->job;
    const delta_source *const s = a->source;
    const int64_t size = acc_size(job->wide), row = u->r0 + i, group = row / ROW_GROUP;
    const pk_strip strip = {.depth = s->rank,
                            .ldrow = ROW_GROUP,
                            .ldw = w.ld,
                            .cols = u->cols - j,
                            .row = s->rows + (group * s->rank * ROW_GROUP + row % ROW_GROUP) * size,
                            .panel = s->panels + (u->c0 + j) * s->rank * size,
                            .w = block_at(job, w, i, j),
                            .scale = s->scale,
                            .mr = (int)min64(MR, u->rows - i)};
    return strip;
}

/* Whole tiles without a delta in between; returns at which column it stopped. */
static int64_t pass_strip(const pass *a, const unit_place *u, block w, int64_t i) {
    const engine_job *const job = a->job;
    const pk_row_kernels *const k = &job->isa->dtype[job->w.dtype];
    const int pairs = a->source->pairs;
    pk_strip s = strip_at(a, u, w, i, 0);
    s.cols -= s.cols % (a->trace ? SEGMENT : job->isa->nr[job->wide]);
    if (s.cols == 0 || (a->trace && (!k->traced[pairs] || s.mr < MR))) return 0;
    if (job->direct && !job->dry && u->r0 + i + 2 * MR <= job->w.rows) s.next = mat_at(&job->w, u->r0 + i + MR, u->c0);
    if (a->trace)
        k->traced[pairs](a->op == OP_SUB, &s, a->trace);
    else
        k->fused[pairs](a->op, &s);
    return s.cols;
}

/* the delta of up to MR segments, with zeros beyond n columns */
static void segments_delta(const pass *a, const unit_place *u, block w, int64_t i, int64_t j, int64_t n) {
    const engine_job *const job = a->job;
    const int64_t nr = job->isa->nr[job->wide], size = acc_size(job->wide), rows = min64(MR, u->rows - i);
    if (n < SEGMENT) memset(a->delta, 0, (size_t)(MR * SEGMENT * size));
    if (a->source->d->law != PK_LOWRANK) {
        mat_pack(job->isa, &a->source->full, u->r0 + i, u->c0 + j, rows, n, a->delta, SEGMENT, a->source->d->alpha,
                 job->wide);
        return;
    }
    for (int64_t q = 0; q < n; q += nr) {
        const pk_strip s = strip_at(a, u, w, i, j + q);
        char *const to = a->delta + q * size;
        if (a->source->pairs)
            job->isa->pairs(s.depth, s.row, s.ldrow, 1, s.panel, (float *)(void *)to, SEGMENT, s.scale, s.mr, 0);
        else
            job->isa->tile[job->wide](s.depth, s.row, s.ldrow, s.panel, to, SEGMENT, s.mr, 0);
    }
}

static void run_pass(const pass *a, const unit_place *u, block w) {
    const pk_row_kernels *const k = &a->job->isa->dtype[a->job->w.dtype];
    for (int64_t i = 0; i < u->rows; i += MR) {
        int64_t j = a->source->d->law == PK_LOWRANK ? pass_strip(a, u, w, i) : 0;
        for (; j < u->cols; j += SEGMENT) {
            const int64_t n = min64(SEGMENT, u->cols - j);
            segments_delta(a, u, w, i, j, n);
            for (int64_t q = 0; q < MR && i + q < u->rows; q++) {
                char *const at = block_at(a->job, w, i + q, j);
                const char *const by = a->delta + q * SEGMENT * acc_size(a->job->wide);
                if (a->trace)
                    (a->op == OP_ADD ? k->record : k->restore)(at, by, n, a->trace);
                else
                    k->apply(a->op, at, by, at, n);
            }
        }
    }
}

/* as the passes hash */
static uint32_t hash_block(const engine_job *job, const unit_place *u, block w) {
    const int64_t size = element_size(job);
    pk_trace t;
    trace_start(&t, NULL, NULL);
    for (int64_t i = 0; i < u->rows; i += MR)
        for (int64_t j = 0; j < u->cols; j += SEGMENT)
            for (int64_t q = i; q < i + MR && q < u->rows; q++) {
                _Alignas(64) char part[SEGMENT * 8] = {0};
                const int64_t n = min64(SEGMENT, u->cols - j);
                memcpy(part, block_at(job, w, q, j), (size_t)(n * size));
                job->isa->hash(t.hash, part, SEGMENT * size);
            }
    return trace_hash(&t);
}

/* takes the differences of a code out again */
static void remove_code(const engine_job *job, const unit_place *u, block w, pk_trace *t) {
    for (int64_t i = 0; i < u->rows; i += MR)
        for (int64_t j = 0; j < u->cols; j += SEGMENT)
            for (int64_t q = i; q < i + MR && q < u->rows; q++)
                trace_get(t, block_at(job, w, q, j), min64(SEGMENT, u->cols - j), element_size(job), -1);
}

static void copy_block(const engine_job *job, const unit_place *u, block from, block to) {
    for (int64_t i = 0; i < u->rows; i++)
        memcpy(block_at(job, to, i, 0), block_at(job, from, i, 0), (size_t)(u->cols * element_size(job)));
}

/* The arena's bytes of a unit that there is a record of, else NULL. */
static char *recorded(const engine_job *job, const unit_place *u, unit_entry *e) {
    if (!job->in) return NULL;
    *e = entry_get(job->in->data, u->id);
    const uint64_t length = e->mode_size >> 2, whole = (uint64_t)(u->rows * u->cols * element_size(job));
    const unsigned mode = e->mode_size & 3u;
    if (mode == UNIT_EMPTY || e->offset > job->in_head.used || length > job->in_head.used - e->offset) return NULL;
    if (mode == UNIT_COPIED ? length != whole : length > whole) return NULL;
    return arena_at(job->in->data, job->in_head.units, e->offset);
}

/* w: merged bits -> the bits before, or, where it has changed, the delta taken out plainly */
static void restore_unit(engine_job *job, const unit_place *u, block w, unit_buffers *b) {
    unit_entry e;
    char *const data = recorded(job, u, &e);
    pass a = {job, job->old, OP_SUB, NULL, b->delta};
    if (data && (e.mode_size & 3u) == UNIT_CODED) {
        const size_t length = e.mode_size >> 2;
        memcpy(b->code, data, length);
        pk_trace t;
        trace_start(&t, b->code, b->code + length);
        a.trace = &t;
        run_pass(&a, u, w);
        if (trace_hash(&t) == e.hash) return;
        trace_start(&t, b->code, b->code + length);
        remove_code(job, u, w, &t);
    } else if (data && hash_block(job, u, w) == e.hash) {
        copy_block(job, u, (block){data, u->cols}, w);
        return;
    } else {
        run_pass(&a, u, w);
    }
    if (job->in) atomic_store_explicit(&job->changed, 1, memory_order_relaxed);
}

/* Takes room of the arena for a unit: as much as a copy would need, enough for many that are coded, so that threads
 * seldom wait for each other. 0: there is none. */
static int arena_take(engine_job *job, const unit_place *u, uint64_t size, unit_buffers *b) {
    const uint64_t whole = (uint64_t)(u->rows * u->cols * element_size(job));
    uint64_t used = atomic_load(&job->used), from, end;
    do {
        from = used == b->end ? b->at : used; /* goes on where it ends, if nobody has taken that */
        if (job->room - from < size) {
            atomic_store_explicit(&job->status, PK_FULL_RECORD, memory_order_relaxed);
            return 0;
        }
        end = used + whole < job->room ? used + whole : job->room;
    } while (!atomic_compare_exchange_weak(&job->used, &used, end));
    if (from != b->at) memset(arena_at(job->out->data, engine_units(job), b->at), 0, (size_t)(b->end - b->at));
    b->at = from;
    b->end = end;
    return 1;
}

/* gives back what is left, if nobody has taken what follows */
static void arena_leave(engine_job *job, const unit_buffers *b) {
    uint64_t end = b->end;
    if (b->at < end && !atomic_compare_exchange_strong(&job->used, &end, b->at))
        memset(arena_at(job->out->data, engine_units(job), b->at), 0, (size_t)(b->end - b->at));
}

/* room in the arena for a unit's record, NULL if there is none */
static char *reserve(engine_job *job, const unit_place *u, uint32_t hash, unsigned mode, int64_t size,
                     unit_buffers *b) {
    if (b->end - b->at < (uint64_t)size && !arena_take(job, u, (uint64_t)size, b)) return NULL;
    const unit_entry e = {hash, mode | (uint32_t)size << 2, b->at};
    b->at += (uint64_t)size;
    entry_set(job->out->data, u->id, &e);
    return arena_at(job->out->data, engine_units(job), e.offset);
}

static int block_finite(const engine_job *job, const unit_place *u, block w) {
    int finite = 1;
    for (int64_t i = 0; i < u->rows && finite; i++)
        finite = job->isa->dtype[job->w.dtype].finite(block_at(job, w, i, 0), u->cols);
    return finite;
}

/* Merges w and records it by a copy of its bits; 0 if there is no room. */
static int record_copy(engine_job *job, const unit_place *u, block w, unit_buffers *b) {
    const int64_t size = u->rows * u->cols * element_size(job);
    const pass a = {job, job->new_, OP_ADD, NULL, b->delta};
    char *const to = reserve(job, u, 0, UNIT_COPIED, size, b);
    if (!to) return 0;
    copy_block(job, u, w, (block){to, u->cols});
    run_pass(&a, u, w);
    unit_entry e = entry_get(job->out->data, u->id);
    e.hash = hash_block(job, u, w);
    entry_set(job->out->data, u->id, &e);
    return 1;
}

/* Merges w, checks and records it. 0: w has its bits back, and job->status says why. */
static int record_unit(engine_job *job, const unit_place *u, block w, unit_buffers *b) {
    unsigned char *const end = b->code + sizeof b->code;
    pk_trace t;
    trace_start(&t, b->code, end);
    pass a = {job, job->new_, OP_ADD, &t, b->delta};
    run_pass(&a, u, w);
    const int64_t code = t.code - b->code, wide = end - t.wide;
    const int bad = t.bad && !block_finite(job, u, w), refused = bad && job->check;
    const int coded = !bad && code + wide <= u->rows * u->cols * element_size(job);
    if (!job->out && !refused) return 1;
    if (coded) {
        char *const to = reserve(job, u, trace_hash(&t), UNIT_CODED, code + wide, b);
        if (to) {
            memcpy(to, b->code, (size_t)code);
            memcpy(to + code, t.wide, (size_t)wide);
            return 1;
        }
    }
    trace_start(&t, b->code, end);
    a.op = OP_SUB;
    run_pass(&a, u, w);
    if (refused) atomic_store_explicit(&job->status, PK_NONFINITE, memory_order_relaxed);
    /* too much to code, or inf and NaN, where another ISA may get other bits */
    return !refused && !coded && record_copy(job, u, w, b);
}

static void run_unit(engine_job *job, const unit_place *u, unit_buffers *b) {
    const int own = job->direct && !job->dry;
    const block w = own ? (block){mat_at(&job->w, u->r0, u->c0), job->w.rs} : (block){b->bits, u->cols};
    for (int64_t i = 0; !own && i < u->rows; i++)
        bits_gather(&job->w, u->r0 + i, u->c0, u->cols, block_at(job, w, i, 0));
    if (job->old) restore_unit(job, u, w, b);
    if (job->new_ && (job->out || job->check)) {
        if (!record_unit(job, u, w, b)) return;
    } else if (job->new_) {
        const pass a = {job, job->new_, OP_ADD, NULL, b->delta};
        run_pass(&a, u, w);
    }
    for (int64_t i = 0; !job->direct && !job->dry && i < u->rows; i++)
        bits_scatter(&job->w, u->r0 + i, u->c0, u->cols, block_at(job, w, i, 0));
}

static void run_range(int64_t begin, int64_t end, void *ctx) {
    engine_job *const job = ctx;
    unit_buffers b;
    b.at = b.end = 0;
    for (int64_t i = begin; i < end; i++) {
        if (atomic_load_explicit(&job->status, memory_order_relaxed) != PK_OK) return;
        const unit_place u = place_of(job, i);
        if (job->old && !job->new_ && job->in && job->in == job->out &&
            (entry_get(job->in->data, u.id).mode_size & 3u) == UNIT_EMPTY)
            continue; /* taking back a merge that stopped: this unit was not written */
        run_unit(job, &u, &b);
    }
    arena_leave(job, &b);
}

static int64_t source_rank(const delta_source *s) {
    return s && s->d->law == PK_LOWRANK ? s->rank : 0;
}

int engine_run(engine_job *job, pk_parallel_fn par) {
    const int64_t rank = source_rank(job->old) + source_rank(job->new_), l2 = 256 * 1024;
    const int64_t per_unit = max64(1, rank * UNIT_COLS * acc_size(job->wide));
    job->chunk = max64(1, min64(job->col_units, l2 / per_unit));
    const int64_t elements = job->unit_rows * min64(job->w.cols, UNIT_COLS);
    const int64_t work = elements * (rank + 16) / 16 + 100;
    const int rc = run_parallel(par, engine_units(job), work, run_range, job);
    return rc != PK_OK ? rc : atomic_load(&job->status);
}
