/* record.c: writes and reads undo records. */
#include "record.h"

#include <string.h>

#include "dtype.h"

enum { MAGIC = 0x52554b50, VERSION = 2 };

const uint32_t trace_first[16] = {
    0x85ebca6bu, 0x0bd794d6u, 0x91c35f41u, 0x17af29acu, 0x9d9af417u, 0x2386be82u, 0xa97288edu, 0x2f5e5358u,
    0xb54a1dc3u, 0x3b35e82eu, 0xc121b299u, 0x470d7d04u, 0xccf9476fu, 0x52e511dau, 0xd8d0dc45u, 0x5ebca6b0u,
};

/* one entry for each byte, eight bytes each */
#define RANK(m, b) ((uint64_t)__builtin_popcount((m) & ((1u << (b)) - 1)))
#define GATHER(m, b) ((m) >> (b)&1 ? (uint64_t)(b) << 8 * RANK(m, b) : 0)
#define SPREAD(m, b) (((m) >> (b)&1 ? RANK(m, b) : 0x80u) << 8 * (b))
#define ALL(of, m) of(m, 0) | of(m, 1) | of(m, 2) | of(m, 3) | of(m, 4) | of(m, 5) | of(m, 6) | of(m, 7)
#define FOUR(of, m) ALL(of, m), ALL(of, (m) + 1), ALL(of, (m) + 2), ALL(of, (m) + 3)
#define SIXTEEN(of, m) FOUR(of, m), FOUR(of, (m) + 4), FOUR(of, (m) + 8), FOUR(of, (m) + 12)
#define SIXTY_FOUR(of, m) SIXTEEN(of, m), SIXTEEN(of, (m) + 16), SIXTEEN(of, (m) + 32), SIXTEEN(of, (m) + 48)
#define EVERY_BYTE(of) SIXTY_FOUR(of, 0u), SIXTY_FOUR(of, 64u), SIXTY_FOUR(of, 128u), SIXTY_FOUR(of, 192u)

const uint64_t trace_gather[256] = {EVERY_BYTE(GATHER)};
const uint64_t trace_spread[256] = {EVERY_BYTE(SPREAD)};

void trace_start(pk_trace *t, unsigned char *start, unsigned char *end) {
    t->code = start;
    t->wide = end;
    t->start = start;
    memcpy(t->hash, trace_first, sizeof trace_first);
    t->bad = 0;
}

uint32_t trace_hash(const pk_trace *t) {
    uint64_t x = 0, odd = 0x9e3779b97f4a7c15u;
    for (int i = 0; i < 16; i++, odd += 0x3c6ef372fe94f82au) x += (t->hash[i] ^ (odd >> 32)) * odd;
    x ^= x >> 32;
    return (uint32_t)((x * 0x94d049bb133111ebu) >> 32);
}

static INLINE uint64_t bits_get(const void *p, const int64_t size) {
    uint64_t x = 0; /* every machine that the kernels run on puts low bytes first */
    memcpy(&x, p, (size_t)size);
    return x;
}

void trace_put(pk_trace *t, uint64_t mask, const int8_t *steps, const void *old, const void *back, int64_t size) {
    unsigned char *const top = t->code++;
    *top = 0;
    for (int i = 0; i < 8; i++)
        if (mask >> 8 * i & 255u) {
            *top |= (unsigned char)(1u << i);
            *t->code++ = (unsigned char)(mask >> 8 * i);
        }
    for (; mask; mask &= mask - 1) {
        const int64_t at = __builtin_ctzll(mask);
        *t->code++ = (unsigned char)steps[at];
        if (!step_is_far(steps[at])) continue;
        const uint64_t by =
            bits_get((const char *)old + at * size, size) - bits_get((const char *)back + at * size, size);
        t->wide -= size;
        memcpy(t->wide, &by, (size_t)size);
    }
}

static INLINE void get_of(pk_trace *t, char *bits, int64_t n, const int64_t size, int sign) {
    const unsigned top = *t->code++;
    uint64_t mask = 0;
    for (int i = 0; i < 8; i++)
        if (top >> i & 1) mask |= (uint64_t)*t->code++ << 8 * i;
    for (; mask; mask &= mask - 1) {
        const int64_t at = __builtin_ctzll(mask);
        const int8_t step = (int8_t)*t->code++;
        uint64_t by = (uint64_t)(int64_t)step;
        if (step_is_far(step)) {
            const int there = t->wide - t->start >= size;
            if (there) t->wide -= size;
            by = there ? bits_get(t->wide, size) : 0;
        }
        if (at >= n) continue; /* not a code of ours */
        const uint64_t x = bits_get(bits + at * size, size) + (sign > 0 ? by : 0 - by);
        memcpy(bits + at * size, &x, (size_t)size);
    }
}

void trace_get(pk_trace *t, void *bits, int64_t n, int64_t size, int sign) {
    if (size == 2)
        get_of(t, bits, n, 2, sign);
    else if (size == 4)
        get_of(t, bits, n, 4, sign);
    else
        get_of(t, bits, n, 8, sign);
}

unit_entry entry_get(const void *block, int64_t unit) {
    unit_entry e;
    memcpy(&e, (const char *)block + sizeof(record_head) + (size_t)unit * sizeof e, sizeof e);
    return e;
}

void entry_set(void *block, int64_t unit, const unit_entry *e) {
    memcpy((char *)block + sizeof(record_head) + (size_t)unit * sizeof *e, e, sizeof *e);
}

char *arena_at(void *block, int64_t units, uint64_t offset) {
    return (char *)block + sizeof(record_head) + (size_t)units * sizeof(unit_entry) + offset;
}

int head_get(const pk_record *record, record_head *head) {
    if (!record->data || record->size < sizeof *head) return 0;
    memcpy(head, record->data, sizeof *head);
    if (head->magic != MAGIC || head->version != VERSION || head->units < 0) return 0;
    const uint64_t room = record->size - sizeof *head;
    return (uint64_t)head->units <= room / sizeof(unit_entry) &&
           head->used == room - (uint64_t)head->units * sizeof(unit_entry);
}

void head_set(void *block, record_head *head) {
    head->magic = MAGIC;
    head->version = VERSION;
    memcpy(block, head, sizeof *head);
}
