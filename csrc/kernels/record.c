/* record.c: writes and reads undo records. */
#include "record.h"

#include <string.h>

enum { MAGIC = 0x52554b50, VERSION = 1 };

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

static inline __attribute__((always_inline)) void bits_step(char *a, int step, const int64_t size) {
    uint64_t x;
    if (size == 2) {
        uint16_t h;
        memcpy(&h, a, 2);
        h = (uint16_t)(h + step);
        memcpy(a, &h, 2);
    } else if (size == 4) {
        uint32_t u;
        memcpy(&u, a, 4);
        u += (uint32_t)step;
        memcpy(a, &u, 4);
    } else {
        memcpy(&x, a, 8);
        x += (uint64_t)(int64_t)step;
        memcpy(a, &x, 8);
    }
}

static inline __attribute__((always_inline)) void code_undo_of(const unsigned char *code, int64_t bytes, char *dst,
                                                               int64_t ld, int64_t cols, int64_t rows,
                                                               const int64_t size) {
    const unsigned char *const end = code + bytes;
    int64_t row = 0, col = 0;
    while (end - code >= 2) {
        const int step = (int8_t)code[1];
        col += code[0];
        code += 2;
        while (__builtin_expect(col >= cols, 0)) {
            col -= cols;
            dst += ld;
            if (++row >= rows) return; /* not a code of ours */
        }
        char *const at = dst + col * size;
        if (__builtin_expect(step == RAW, 0)) {
            if (end - code < size) return;
            memcpy(at, code, (size_t)size);
            code += size;
        } else {
            bits_step(at, step, size); /* SKIP adds 0 */
        }
    }
}

void code_undo(const unsigned char *code, int64_t bytes, char *dst, int64_t ld, int64_t cols, int64_t rows,
               int64_t size) {
    if (size == 2)
        code_undo_of(code, bytes, dst, ld, cols, rows, 2);
    else if (size == 4)
        code_undo_of(code, bytes, dst, ld, cols, rows, 4);
    else
        code_undo_of(code, bytes, dst, ld, cols, rows, 8);
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
