/* dots.h: see dots.c. */
#ifndef PEFT_C_KERNELS_DOTS_H
#define PEFT_C_KERNELS_DOTS_H

#include "internal.h"

/* t[i * ldt + j] = sum_k x(i, k) a(j, k) as acc. With area->base NULL it only counts its workspace. */
int dots_run(const pk_mat *x, const pk_mat *a, void *t, int64_t ldt, int wide, work_area *area, pk_parallel_fn par);

#endif
