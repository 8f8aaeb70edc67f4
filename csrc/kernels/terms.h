/* terms.h: the second product of low-rank terms, sum_i scale_i (x A_i^T) B_i^T: H B^T of all the ranks side by side. */
#ifndef PEFT_C_KERNELS_TERMS_H
#define PEFT_C_KERNELS_TERMS_H

#include "words.h"

/* It is summed word by word: of acc, or of pairs of bf16 (pk_isa.pairs) where x, every B and y are bf16. Then H is rounded
 * to bf16, as torch's is, a part of odd rank ends with half a word, and the ranks are at most DEPTH: one panel. */
typedef struct {
    const pk_isa *isa;
    const pk_lowrank *parts; /* up = B (n, r) */
    int nparts, wide, pairs;
    int64_t rank, depth; /* of all parts: ranks, words */
} term_sums;

/* x: NULL if there is none: no pairs */
term_sums terms_of(const pk_mat *y, const pk_mat *x, const pk_lowrank *parts, int nparts, int wide);

/* to = H turned, (depth, m) words, from t = x A^T (m, rank), acc. `to` has room for (rank, m) words, `halves` for as many
 * bf16; the latter is for pairs only. */
void terms_turn(const term_sums *s, const char *t, int64_t m, char *halves, char *to);

/* words p .. p + np of B^T's columns j .. j + n as a panel, zeros from n on */
void terms_pack(const term_sums *s, int64_t p, int64_t np, int64_t j, int64_t n, char *panel);

/* d = or, with `add`, += the sums over np words from row, of (np, m) words, and a panel: mr rows, ldd apart */
static inline void terms_tile(const term_sums *s, int64_t np, const char *row, int64_t m, const char *panel, void *d,
                              int64_t ldd, int mr, int add) {
    words_tile(s->isa, np, row, m, 1, panel, d, ldd, mr, add, s->wide, s->pairs);
}

#endif
