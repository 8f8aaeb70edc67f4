/* words.h: matrices as the micro-kernels sum them, word by word: of acc, or pairs of bf16 (pk_isa.pairs). */
#ifndef PEFT_C_KERNELS_WORDS_H
#define PEFT_C_KERNELS_WORDS_H

#include "internal.h"

/* how many hold n elements */
static inline int64_t words_of(int64_t n, int pairs) {
    return pairs ? (n + 1) / 2 : n;
}

/* to[q * ld + i] = word p + q along a's rows, column j + i, q < np, i < n */
static inline void words_pack(const pk_isa *isa, const pk_mat *a, int64_t p, int64_t np, int64_t j, int64_t n,
                              void *to, int64_t ld, int wide, int pairs) {
    if (pairs)
        isa->pack_pairs((const uint16_t *)(const void *)mat_at(a, 2 * p, j), a->rs, a->cs,
                        min64(2 * np, a->rows - 2 * p), n, to, ld);
    else
        mat_pack(isa, a, p, j, np, n, to, ld, 1.0, wide);
}

/* pk_isa.tile or pairs: row[p * sp + i * si], si = 1 but for pairs; add = 1: goes on from d or, with pairs, is added to it */
static inline void words_tile(const pk_isa *isa, int64_t np, const void *row, int64_t sp, int64_t si,
                              const void *panel, void *d, int64_t ldd, int mr, int add, int wide, int pairs) {
    if (pairs)
        isa->pairs(np, row, sp, si, panel, d, ldd, 1.0f, mr, add);
    else
        isa->tile[wide](np, row, sp, panel, d, ldd, mr, add);
}

#endif
