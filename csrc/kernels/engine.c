/* engine.c: the pass over a weight, unit by unit. */
#include "engine.h"

#include <string.h>

#include "dtype.h"

typedef struct {
    int64_t id, r0, c0, rows, cols, ld; /* ld: of the delta, in elements */
} unit_place;

typedef struct {
    char *p;
    int64_t ld; /* bytes */
} block;

typedef struct {
    _Alignas(64) char delta[UNIT_SIZE * 8];
    _Alignas(64) char first[UNIT_SIZE * 8];  /* gathered or restored bits */
    _Alignas(64) char second[UNIT_SIZE * 8]; /* merged bits before they are written */
    _Alignas(64) int8_t steps[MR * STEPS_LD];
    unsigned char code[UNIT_SIZE * 8 + CODE_SLACK];
} unit_buffers;

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
    job->op = OP_ADD;
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
    u.ld = round_up(u.cols, NR_MAX);
    return u;
}

/* the lines of the rows that the walk meets next, while this panel is being computed */
static void prefetch_rows(const engine_job *job, int64_t r, int64_t c, int64_t bytes) {
    for (int64_t i = r; i < r + MR && i < job->w.rows; i++) {
        const char *const p = mat_at(&job->w, i, c);
        for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(p + b, 1);
    }
}

/* The low-rank delta of rows i .. i + MR of a unit, or (fuse: not OP_SET, and a weight to walk directly) its whole panels
 * straight into the weight; what is left to apply then starts at the column returned. trace: see fused. */
static int64_t lowrank_rows(const engine_job *job, const delta_source *s, const unit_place *u, int64_t i, char *delta,
                            row_op fuse, pk_trace *trace) {
    const int64_t size = acc_size(job->wide), nr = job->isa->nr[job->wide], depth = s->rank, row = u->r0 + i;
    const int64_t width = pk_dtype_size(job->w.dtype), whole = fuse == OP_SET ? 0 : u->cols / nr * nr;
    char *const old = trace ? trace->old : NULL;
    int8_t *const steps = trace ? trace->steps : NULL;
    pk_tile t = {depth, ROW_GROUP, job->w.rs, NULL, NULL, NULL, s->scale, (int)min64(MR, u->rows - i)};
    t.row = s->rows + (row / ROW_GROUP * depth * ROW_GROUP + row % ROW_GROUP) * size;
    for (int64_t j = 0; j < u->cols; j += nr) {
        t.panel = s->panels + (u->c0 + j) * depth * size;
        if (job->direct) prefetch_rows(job, row + MR, u->c0 + j, nr * width);
        if (j < whole) {
            t.w = mat_at(&job->w, row, u->c0 + j);
            if (trace) {
                trace->old = old + j * width;
                trace->steps = steps + j;
            }
            job->isa->dtype[job->w.dtype].fused[s->pairs](fuse, &t, trace);
        } else if (s->pairs) {
            job->isa->pairs(depth, t.row, ROW_GROUP, t.panel, (float *)(void *)delta + i * u->ld + j, u->ld, s->scale,
                            t.mr);
        } else {
            job->isa->tile[job->wide](depth, t.row, ROW_GROUP, t.panel, delta + (i * u->ld + j) * size, u->ld, t.mr,
                                      0);
        }
    }
    if (trace) {
        trace->old = old;
        trace->steps = steps;
    }
    return whole;
}

static int64_t lowrank_delta(const engine_job *job, const delta_source *s, const unit_place *u, char *delta,
                             row_op fuse) {
    int64_t whole = 0;
    for (int64_t i = 0; i < u->rows; i += MR) whole = lowrank_rows(job, s, u, i, delta, fuse, NULL);
    return whole;
}

static void unit_delta(const engine_job *job, const delta_source *s, const unit_place *u, char *delta) {
    if (s->d->law == PK_LOWRANK)
        lowrank_delta(job, s, u, delta, OP_SET);
    else
        mat_pack(job->isa, &s->full, u->r0, u->c0, u->rows, u->cols, delta, u->ld, s->d->alpha, job->wide);
}

static block weight_block(const engine_job *job, const unit_place *u, char *buffer) {
    const int64_t size = pk_dtype_size(job->w.dtype);
    if (job->direct) return (block){mat_at(&job->w, u->r0, u->c0), job->w.rs * size};
    const block b = {buffer, u->cols * size};
    for (int64_t i = 0; i < u->rows; i++) bits_gather(&job->w, u->r0 + i, u->c0, u->cols, b.p + i * b.ld);
    return b;
}

static void write_block(const engine_job *job, const unit_place *u, block from) {
    const int64_t size = pk_dtype_size(job->w.dtype);
    if (job->dry) return;
    for (int64_t i = 0; i < u->rows; i++) {
        char *const to = mat_at(&job->w, u->r0 + i, u->c0), *const row = from.p + i * from.ld;
        if (!job->direct)
            bits_scatter(&job->w, u->r0 + i, u->c0, u->cols, row);
        else if (to != row)
            memcpy(to, row, (size_t)(u->cols * size));
    }
}

static void apply_block(const engine_job *job, const unit_place *u, row_op op, block from, const char *delta,
                        block to) {
    for (int64_t i = 0; i < u->rows; i++)
        job->isa->dtype[job->w.dtype].apply(op, from.p + i * from.ld, delta + i * u->ld * acc_size(job->wide),
                                            to.p + i * to.ld, u->cols);
}

/* the weight itself op= the delta, in place */
static void update_in_place(const engine_job *job, const delta_source *s, const unit_place *u, row_op op,
                            char *delta) {
    const block w = {mat_at(&job->w, u->r0, u->c0), job->w.rs * pk_dtype_size(job->w.dtype)};
    if (s->d->law != PK_LOWRANK || (op != OP_ADD && op != OP_SUB)) {
        unit_delta(job, s, u, delta);
        apply_block(job, u, op, w, delta, w);
        return;
    }
    const int64_t done = lowrank_delta(job, s, u, delta, op);
    if (done == u->cols) return;
    unit_place rest = *u;
    rest.cols -= done;
    const block right = {w.p + done * pk_dtype_size(job->w.dtype), w.ld};
    apply_block(job, &rest, op, right, delta + done * acc_size(job->wide), right);
}

static uint32_t hash_block(const engine_job *job, const unit_place *u, block b) {
    unit_hash h;
    hash_start(&h);
    for (int64_t i = 0; i < u->rows; i++)
        hash_add(job->isa, &h, b.p + i * b.ld, u->cols * pk_dtype_size(job->w.dtype));
    return hash_end(&h);
}

/* from: merged bits, to: the bits before; may be the same block */
static void undo_unit(engine_job *job, const unit_place *u, block from, char *delta, block to) {
    const int64_t size = pk_dtype_size(job->w.dtype), bytes = u->cols * size;
    const unsigned char *code = NULL;
    unit_entry e = {0, 0, 0};
    if (job->in) {
        e = entry_get(job->in->data, u->id);
        const int64_t length = e.mode_size >> 2;
        const int known = (e.mode_size & 3u) != UNIT_EMPTY && e.offset <= job->in_head.used &&
                          (uint64_t)length <= job->in_head.used - e.offset && e.hash == hash_block(job, u, from);
        if (known)
            code = (const unsigned char *)arena_at(job->in->data, job->in_head.units, e.offset);
        else
            atomic_store_explicit(&job->changed, 1, memory_order_relaxed);
    }
    if (code && (e.mode_size & 3u) == UNIT_COPIED && (int64_t)(e.mode_size >> 2) == u->rows * bytes) {
        for (int64_t i = 0; i < u->rows; i++) memcpy(to.p + i * to.ld, code + i * bytes, (size_t)bytes);
        return;
    }
    const row_op op = job->old->d->law == PK_SCALE ? OP_DIV : OP_SUB;
    if (to.p == from.p && job->direct && !job->dry) {
        update_in_place(job, job->old, u, op, delta);
    } else {
        unit_delta(job, job->old, u, delta);
        apply_block(job, u, op, from, delta, to);
    }
    if (code) code_undo(code, e.mode_size >> 2, to.p, to.ld, u->cols, u->rows, size);
}

/* puts a unit's record into the arena; 0 if there is no room */
static int keep_record(engine_job *job, const unit_place *u, const unit_code *c, const unsigned char *start, block old,
                       uint32_t hash) {
    const int64_t bytes = u->cols * pk_dtype_size(job->w.dtype);
    const int64_t size = c->full ? u->rows * bytes : c->to - start;
    const uint64_t offset = atomic_fetch_add_explicit(&job->used, (uint64_t)size, memory_order_relaxed);
    if (offset + (uint64_t)size > job->room) return 0;
    char *const to = arena_at(job->out->data, engine_units(job), offset);
    if (!c->full)
        memcpy(to, start, (size_t)size);
    else
        for (int64_t i = 0; i < u->rows; i++) memcpy(to + i * bytes, old.p + i * old.ld, (size_t)bytes);
    const unit_entry e = {hash, (c->full ? UNIT_COPIED : UNIT_CODED) | (uint32_t)size << 2, offset};
    entry_set(job->out->data, u->id, &e);
    return 1;
}

static void code_row(const engine_job *job, const unit_place *u, unit_code *c, const char *old, const int8_t *steps,
                     int64_t row) {
    if (c->full) return;
    c->to = job->isa->code(c->to, &c->last, steps, old, pk_dtype_size(job->w.dtype), u->cols, row * u->cols);
    c->full = c->to > c->limit;
}

/* from -> merged bits, checked and recorded, in b->second; 0 if the unit must not be written */
static int merge_unit(engine_job *job, const unit_place *u, block from, unit_buffers *b) {
    const int64_t size = pk_dtype_size(job->w.dtype), bytes = u->cols * size;
    const block to = {b->second, bytes};
    unit_code code = {b->code, b->code + u->rows * bytes, 0, 0};
    unit_hash hash;
    int bad = 0;
    hash_start(&hash);
    for (int64_t i = 0; i < u->rows; i++) {
        char *const old = from.p + i * from.ld, *const merged = to.p + i * to.ld;
        job->isa->dtype[job->w.dtype].record(job->op, old, b->delta + i * u->ld * acc_size(job->wide), merged, u->cols,
                                             b->steps, &bad);
        if (!job->out) continue;
        code_row(job, u, &code, old, b->steps, i);
        hash_add(job->isa, &hash, merged, bytes);
    }
    if (bad && job->check) {
        atomic_store_explicit(&job->status, PK_NONFINITE, memory_order_relaxed);
        return 0;
    }
    if (job->out && !keep_record(job, u, &code, b->code, from, hash_end(&hash))) {
        atomic_store_explicit(&job->status, PK_FULL_RECORD, memory_order_relaxed);
        return 0;
    }
    return 1;
}

/* One group of rows, merged in place with a trace: codes it, keeps the old bits in b->first. 1 if the
 * unit is one for merge_unit. */
static int trace_rows(const engine_job *job, const unit_place *u, int64_t i, unit_code *code, unit_buffers *b) {
    const pk_row_kernels *const kernels = &job->isa->dtype[job->w.dtype];
    const int64_t size = pk_dtype_size(job->w.dtype), acc = acc_size(job->wide), bytes = u->cols * size;
    pk_trace trace = {b->first + i * bytes, u->cols, b->steps, 0};
    const int64_t done = lowrank_rows(job, job->new_, u, i, b->delta, OP_ADD, &trace);
    for (int64_t q = 0; q < MR && i + q < u->rows; q++) {
        char *const old = b->first + (i + q) * bytes;
        if (done < u->cols) {
            char *const w = mat_at(&job->w, u->r0 + i + q, u->c0 + done);
            memcpy(old + done * size, w, (size_t)(bytes - done * size));
            kernels->record(OP_ADD, old + done * size, b->delta + ((i + q) * u->ld + done) * acc, w, u->cols - done,
                            b->steps + q * STEPS_LD + done, &trace.bad);
        }
        code_row(job, u, code, old, b->steps + q * STEPS_LD, i + q);
    }
    return trace.bad;
}

/* Merges a unit in place and records it; 0: it has its old bits again, for want of room (status) or as trace_rows says. */
static int merge_in_place(engine_job *job, const unit_place *u, unit_buffers *b) {
    const int64_t bytes = u->cols * pk_dtype_size(job->w.dtype);
    const block w = weight_block(job, u, NULL), old = {b->first, bytes};
    unit_code code = {b->code, b->code + u->rows * bytes, 0, 0};
    int64_t i = 0;
    int bad = 0;
    for (; i < u->rows && !bad; i += MR) bad = trace_rows(job, u, i, &code, b);
    if (!bad) {
        if (keep_record(job, u, &code, b->code, old, hash_block(job, u, w))) return 1;
        atomic_store_explicit(&job->status, PK_FULL_RECORD, memory_order_relaxed);
    }
    for (int64_t q = 0; q < i && q < u->rows; q++) memcpy(w.p + q * w.ld, old.p + q * old.ld, (size_t)bytes);
    return 0;
}

static void run_unit(engine_job *job, const unit_place *u, unit_buffers *b) {
    block cur = weight_block(job, u, b->first);
    const block buffer = {b->first, u->cols * pk_dtype_size(job->w.dtype)};
    if (job->old) {
        const block to = job->direct && !job->dry ? cur : buffer;
        undo_unit(job, u, cur, b->delta, to);
        cur = to;
    }
    if (job->new_ && !job->old && !job->out && !job->check && job->direct && !job->dry) {
        update_in_place(job, job->new_, u, job->op, b->delta);
        return;
    }
    if (job->new_ && job->out && job->direct && !job->dry && job->new_->d->law == PK_LOWRANK) {
        if (merge_in_place(job, u, b)) return;
        if (atomic_load_explicit(&job->status, memory_order_relaxed) == PK_FULL_RECORD) return;
    }
    if (job->new_) {
        unit_delta(job, job->new_, u, b->delta);
        if (job->out || job->check) {
            if (!merge_unit(job, u, cur, b)) return;
            cur = (block){b->second, buffer.ld};
        } else {
            apply_block(job, u, job->op, cur, b->delta, buffer);
            cur = buffer;
        }
    }
    write_block(job, u, cur);
}

static void run_range(int64_t begin, int64_t end, void *ctx) {
    engine_job *const job = ctx;
    unit_buffers b;
    for (int64_t i = begin; i < end; i++) {
        if (atomic_load_explicit(&job->status, memory_order_relaxed) != PK_OK) return;
        const unit_place u = place_of(job, i);
        if (job->old && !job->new_ && job->in && job->in == job->out &&
            (entry_get(job->in->data, u.id).mode_size & 3u) == UNIT_EMPTY)
            continue; /* taking back a merge that stopped: this unit was not written */
        run_unit(job, &u, &b);
    }
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

static void match_range(int64_t begin, int64_t end, void *ctx) {
    engine_job *const job = ctx;
    _Alignas(64) char buffer[UNIT_SIZE * 8];
    for (int64_t i = begin; i < end && !atomic_load_explicit(&job->changed, memory_order_relaxed); i++) {
        const unit_place u = place_of(job, i);
        if (entry_get(job->in->data, u.id).hash != hash_block(job, &u, weight_block(job, &u, buffer)))
            atomic_store_explicit(&job->changed, 1, memory_order_relaxed);
    }
}

int engine_match(engine_job *job, pk_parallel_fn par) {
    return run_parallel(par, engine_units(job), UNIT_SIZE / 8, match_range, job);
}
