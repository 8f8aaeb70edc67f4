/* record.h: the undo record: header, a table of units, an arena of their codes (see pk_record in kernels.h).
 *
 * Code of a unit: of one segment after the other, in the order of the strips (internal.h), the differences of bits
 * that subtracting misses: a byte that says which bytes of the segment's mask are not 0, these bytes, and for each bit
 * in them the difference in a byte. One that is FAR stands for a difference as wide as an element; those come last,
 * from the end backwards. */
#ifndef PEFT_C_KERNELS_RECORD_H
#define PEFT_C_KERNELS_RECORD_H

#include "internal.h"

enum { CODE_MAX = UNIT_SIZE / SEGMENT * (1 + SEGMENT / 8 + SEGMENT), CODE_SLACK = SEGMENT };
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

/* at the beginning of the code of a unit: start .. end */
void trace_start(pk_trace *t, unsigned char *start, unsigned char *end);
uint32_t trace_hash(const pk_trace *t);

/* table and arena inside a record's block, which may be misaligned */
unit_entry entry_get(const void *block, int64_t unit);
void entry_set(void *block, int64_t unit, const unit_entry *e);
char *arena_at(void *block, int64_t units, uint64_t offset);
void head_set(void *block, record_head *head); /* fills magic and version in, writes it */
/* 0 if the block is not a record of its own size */
int head_get(const pk_record *record, record_head *head);

#endif
