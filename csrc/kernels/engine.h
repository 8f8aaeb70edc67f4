/* engine.h: one pass over a weight in units: undo an old delta, apply a new one, check, record (engine.c), and the
 * operations made of it (merge.c).
 *
 * The weight is walked along its contiguous direction ("rows" of the walk; a transposed weight swaps the factors'
 * parts, which changes no bit). A unit is at most UNIT_COLS columns of a few rows. Units are taken in an order that
 * keeps the packed factors of a range of columns in the L2 cache while the rows stream by. A unit is written only after
 * its check and its record succeeded. */
#ifndef PEFT_C_KERNELS_ENGINE_H
#define PEFT_C_KERNELS_ENGINE_H

#include <stdatomic.h>

#include "record.h"

enum { ROW_GROUP = 48 }; /* packed rows lie in groups of as many: a multiple of MR and of every vector */

/* A delta made ready: for PK_LOWRANK, with R = rank,
 *   panels [cols / nr][R][nr]   the factor along the walk's rows, zero padded
 *   rows [rows / 48][R][48]     the other one; up is the one that is multiplied by scale and alpha */
typedef struct {
    const pk_delta *d;
    int64_t rank; /* R; with pairs, of 32-bit pairs: each factor's rank halved, rounded up */
    int pairs;    /* bf16 factors kept as pairs of bf16, up multiplied by a power of two only */
    float scale;  /* then: what the sum is still to be multiplied by */
    char *panels, *rows;
    pk_mat full; /* turned as the walk is */
} delta_source;

typedef struct {
    const pk_isa *isa;
    pk_mat w; /* turned as the walk is */
    int wide, transposed, direct;
    int64_t unit_rows, unit_cols, row_units, col_units, chunk;
    const delta_source *old, *new_;
    int check, dry;
    const pk_record *in;
    pk_record *out;
    record_head in_head;
    _Atomic uint64_t used;
    uint64_t room;
    atomic_int status, changed;
} engine_job;

void engine_setup(engine_job *job, const pk_mat *w, int transposed);
int64_t engine_units(const engine_job *job);
/* how the delta is summed for this weight by this ISA */
int source_math(const pk_isa *isa, const pk_mat *w, const pk_delta *d);
/* packs d's factors for the job's walk, to be summed as math says; takes its memory from area */
int source_prepare(delta_source *s, const engine_job *job, const pk_delta *d, int math, work_area *area,
                   pk_parallel_fn par);
/* over all units; returns job->status or PK_EPARALLEL */
int engine_run(engine_job *job, pk_parallel_fn par);

#endif
