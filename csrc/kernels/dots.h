/* dots.h: t = x a^T, the contraction along the long side of both: forward's x A^T, backward's g B. */
#ifndef PEFT_C_KERNELS_DOTS_H
#define PEFT_C_KERNELS_DOTS_H

#include "internal.h"

/* x and a as one kernel takes them: contiguous rows of types that it knows */
typedef struct {
    const pk_isa *isa;
    pk_mat x, a;
    int wide, kind;
} dots_job;

/* Readies a job; copies what the kernel cannot take to the workspace, which has to live as long as the job. Up to
 * pk_isa.few rows of x, an `a` of contiguous rows of x's type is never copied. */
int dots_prepare(dots_job *d, const pk_mat *x, const pk_mat *a, int wide, work_area *area, pk_parallel_fn par);
/* t[i * ldt + j] = sum_k x(i0 + i, k) a(j0 + j, k) as acc, i < m, j < r; estimated cycles of it */
void dots_block(const dots_job *d, int64_t i0, int64_t m, int64_t j0, int64_t r, void *t, int64_t ldt);
int64_t dots_cost(const dots_job *d, int64_t m, int64_t r);

/* t[i * ldt + j] = sum_k x(i, k) a(j, k). As above, with area->base NULL they only count their workspace. */
int dots_run(const pk_mat *x, const pk_mat *a, void *t, int64_t ldt, int wide, work_area *area, pk_parallel_fn par);

#endif
