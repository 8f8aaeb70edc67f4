/* record.c: writes and reads undo records. */
#include "record.h"

#include <string.h>

enum { MAGIC = 0x52554b50, VERSION = 1, SKIP = 0, RAW = -128, GAP_MAX = 255 };

void hash_start(unit_hash *h) {
    for (int i = 0; i < 32; i++) h->lane[i] = 0x85ebca6bu * (uint32_t)(i + 1);
    h->length = 0;
}

void hash_add(const pk_isa *isa, unit_hash *h, const void *p, int64_t n) {
    isa->hash(h->lane, p, n);
    h->length += (uint64_t)n;
}

uint32_t hash_end(const unit_hash *h) {
    uint64_t x = h->length * 0xbf58476d1ce4e5b9u, odd = 0x9e3779b97f4a7c15u;
    for (int i = 0; i < 32; i++, odd += 0x3c6ef372fe94f82au) x += (h->lane[i] ^ (odd >> 32)) * odd;
    x ^= x >> 32;
    return (uint32_t)((x * 0x94d049bb133111ebu) >> 32);
}

static int64_t bits_minus(const char *a, const char *b, int64_t size) {
    if (size == 2) {
        int16_t x, y;
        memcpy(&x, a, 2);
        memcpy(&y, b, 2);
        return (int64_t)x - y;
    }
    if (size == 4) {
        int32_t x, y;
        memcpy(&x, a, 4);
        memcpy(&y, b, 4);
        return (int64_t)x - y;
    }
    uint64_t x, y;
    memcpy(&x, a, 8);
    memcpy(&y, b, 8);
    return (int64_t)(x - y);
}

static void bits_step(char *a, int step, int64_t size) {
    if (size == 2) {
        uint16_t x;
        memcpy(&x, a, 2);
        x = (uint16_t)(x + step);
        memcpy(a, &x, 2);
    } else if (size == 4) {
        uint32_t x;
        memcpy(&x, a, 4);
        x += (uint32_t)step;
        memcpy(a, &x, 4);
    } else {
        uint64_t x;
        memcpy(&x, a, 8);
        x += (uint64_t)(int64_t)step;
        memcpy(a, &x, 8);
    }
}

static inline __attribute__((always_inline)) void code_row_sized(unit_code *c, const char *old, const char *back,
                                                                 const uint16_t *idx, int64_t n, int64_t base,
                                                                 const int64_t size) {
    unsigned char *to = c->to;
    int64_t last = c->last;
    for (int64_t q = 0; q < n; q++) {
        const int64_t at = idx[q], step = bits_minus(old + at * size, back + at * size, size);
        int64_t gap = base + at - last;
        last = base + at;
        if (__builtin_expect(gap <= GAP_MAX && step >= -127 && step <= 127 && step != 0, 1)) {
            to[0] = (unsigned char)gap;
            to[1] = (unsigned char)(int8_t)step;
            to += 2;
            continue;
        }
        for (; gap > GAP_MAX; gap -= GAP_MAX) {
            *to++ = GAP_MAX;
            *to++ = SKIP;
        }
        *to++ = (unsigned char)gap;
        if (step >= -127 && step <= 127 && step != 0) {
            *to++ = (unsigned char)(int8_t)step;
        } else { /* far off, or NaN: a step of 0 is a NaN whose bits another ISA may not give */
            *to++ = (unsigned char)(int8_t)RAW;
            memcpy(to, old + at * size, (size_t)size);
            to += size;
        }
    }
    c->full = to > c->limit;
    c->to = to;
    c->last = last;
}

void code_row(unit_code *c, const void *old, const void *back, const uint16_t *idx, int64_t n, int64_t base,
              int64_t size) {
    if (c->full) return;
    if (size == 2) code_row_sized(c, old, back, idx, n, base, 2);
    else if (size == 4) code_row_sized(c, old, back, idx, n, base, 4);
    else code_row_sized(c, old, back, idx, n, base, 8);
}

void code_undo(const unsigned char *code, int64_t bytes, char *dst, int64_t ld, int64_t cols, int64_t rows,
               int64_t size) {
    const unsigned char *const end = code + bytes;
    int64_t row = 0, col = 0;
    while (end - code >= 2) {
        const int step = (int8_t)code[1];
        col += code[0];
        code += 2;
        while (col >= cols) {
            col -= cols;
            row++;
        }
        if (row >= rows) return; /* not a code of ours */
        char *const at = dst + row * ld + col * size;
        if (step == RAW) {
            if (end - code < size) return;
            memcpy(at, code, (size_t)size);
            code += size;
        } else if (step != SKIP) {
            bits_step(at, step, size);
        }
    }
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
