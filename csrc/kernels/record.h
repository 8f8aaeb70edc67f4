/* record.h: the undo record: header, a table of units, an arena of their codes (see pk_record in kernels.h).
 *
 * Code of a unit, whose elements are counted along its rows: pairs (gap, step): go on by gap; step +-1..127: the old
 * bits are what unmerge gets plus step; SKIP: nothing here; RAW: the old bits follow. gap counts from the last place. */
#ifndef PEFT_C_KERNELS_RECORD_H
#define PEFT_C_KERNELS_RECORD_H

#include "internal.h"

enum { CODE_SLACK = UNIT_COLS * 10 + 64 }; /* the longest code of a row */
enum { UNIT_EMPTY = 0, UNIT_CODED = 1, UNIT_COPIED = 2 };

typedef struct {
    uint32_t hash;      /* of the merged bits */
    uint32_t mode_size; /* mode | size in bytes << 2 */
    uint64_t offset;    /* in the arena */
} unit_entry;

typedef struct {
    uint32_t magic, version;
    int32_t dtype, law, math, transposed;
    int64_t rows, cols, units; /* as walked: rows of the weight, or columns if transposed */
    uint64_t used;             /* bytes of the arena */
    uint64_t reserved[2];
} record_head;

/* 128 bytes a step, finished with the length */
typedef struct {
    uint32_t lane[32];
    uint64_t length;
} unit_hash;
void hash_start(unit_hash *h);
void hash_add(const pk_isa *isa, unit_hash *h, const void *p, int64_t n);
uint32_t hash_end(const unit_hash *h);

typedef struct {
    unsigned char *to, *limit; /* code so far; a row that ends beyond limit (by CODE_SLACK at most) makes it full */
    int64_t last;
    int full;
} unit_code;
/* calls on every place: bits at row + col of the unit (cols wide) in dst, whose rows are ld bytes apart */
void code_undo(const unsigned char *code, int64_t bytes, char *dst, int64_t ld, int64_t cols, int64_t rows,
               int64_t size);

/* table and arena inside a record's block, which may be misaligned */
unit_entry entry_get(const void *block, int64_t unit);
void entry_set(void *block, int64_t unit, const unit_entry *e);
char *arena_at(void *block, int64_t units, uint64_t offset);
void head_set(void *block, record_head *head); /* fills magic and version in, writes it */
/* 0 if the block is not a record of its own size */
int head_get(const pk_record *record, record_head *head);

#endif
