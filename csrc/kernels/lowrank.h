/* lowrank.h: the product that forward and backward share; see lowrank.c. */
#ifndef PEFT_C_KERNELS_LOWRANK_H
#define PEFT_C_KERNELS_LOWRANK_H

#include "internal.h"

enum {
    LINEAR_ROWS = 516,      /* at most that many rows go through a linear layer at once */
    PACKED_ROWS = 192,      /* or that many, if they are packed before */
    SMALL_WEIGHT = 1 << 15, /* elements: up to there a layer's time is that of the calls around it */
    LARGE_WEIGHT = 1 << 18  /* larger than a core's own cache */
};

/* y (m, n) op= sum_i scale_i (x down_i^T) up_i^T, op OP_ADD or OP_SET: a forward's A and B, a backward's B^T and A^T.
 * t (m, R) acc, contiguous, receives x down^T. With area->base NULL it only counts its workspace. */
int product_run(const pk_mat *y, const pk_mat *x, const pk_lowrank *parts, int nparts, int wide, row_op op, char *t,
                work_area *area, pk_parallel_fn par);

/* all ranks together; are the factors valid for y (m, n), x (m, k)? */
int64_t rank_of(const pk_lowrank *f, int nf);
int factors_fit(const pk_lowrank *f, int nf, int64_t n, int64_t k);

#endif
