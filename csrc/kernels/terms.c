/* terms.c: see terms.h. */
#include "terms.h"

#include <string.h>

#include "lowrank.h"

static int64_t depth_of(const term_sums *s) {
    int64_t depth = 0;
    for (int i = 0; i < s->nparts; i++) depth += words_of(s->parts[i].up.cols, s->pairs);
    return depth;
}

term_sums terms_of(const pk_mat *y, const pk_mat *x, const pk_lowrank *parts, int nparts, int wide) {
    term_sums s = {.isa = pk_isa_now(), .parts = parts, .nparts = nparts, .wide = wide};
    s.rank = rank_of(parts, nparts);
    s.pairs = s.isa->pairs && x && x->dtype == PK_BF16 && y->dtype == PK_BF16 && s.rank <= DEPTH;
    for (int i = 0; i < nparts; i++) s.pairs = s.pairs && parts[i].up.dtype == PK_BF16;
    s.depth = depth_of(&s);
    return s;
}

void terms_turn(const term_sums *s, const char *t, int64_t m, char *halves, char *to) {
    const pk_mat h = {halves, s->rank, m, m, 1, PK_BF16};
    const int64_t size = acc_size(s->wide);
    int64_t p = 0, word = 0;
    for (int i = 0; i < s->nparts; p += s->parts[i++].up.cols)
        s->isa->dtype[s->wide ? PK_F64 : PK_F32].pack(t + p * size, 1, s->rank, s->parts[i].up.cols, m,
                                                      to + p * m * size, m, s->parts[i].scale);
    if (!s->pairs) return;
    s->isa->dtype[PK_BF16].apply(OP_SET, halves, to, halves, s->rank * m);
    p = 0;
    for (int i = 0; i < s->nparts; p += s->parts[i++].up.cols) {
        const pk_mat part = mat_rows(h, p, s->parts[i].up.cols);
        const int64_t words = words_of(part.rows, 1);
        words_pack(s->isa, &part, 0, words, 0, m, to + word * m * 4, m, 0, 1);
        word += words;
    }
}

void terms_pack(const term_sums *s, int64_t p, int64_t np, int64_t j, int64_t n, char *panel) {
    const int64_t nr = s->isa->nr[s->wide], size = acc_size(s->wide);
    int64_t start = 0;
    if (n < nr) memset(panel, 0, (size_t)(np * nr * size));
    for (int i = 0; i < s->nparts; i++) {
        const pk_mat up = mat_transposed(s->parts[i].up);
        const int64_t words = words_of(up.rows, s->pairs), lo = max64(p, start), hi = min64(p + np, start + words);
        if (lo < hi)
            words_pack(s->isa, &up, lo - start, hi - lo, j, n, panel + (lo - p) * nr * size, nr, s->wide, s->pairs);
        start += words;
    }
}
