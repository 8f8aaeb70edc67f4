/* forward.h: the low-rank forward and backward.
 *
 * The contract of the Python side (peft_c._C):
 *
 *   lowrank_forward(layer, x, args=(), kwargs=None) -> Tensor or NotImplemented
 *       Runs layer.base_layer(x, *args, **kwargs) and adds scaling * B(A(dropout(x))) of every active adapter that the
 * layer has. NotImplemented: nothing has been called or changed, take the composed path. A layer's forward is
 *
 *           if not torch.compiler.is_compiling():
 *               result = _C.lowrank_forward(self, x, args, kwargs)
 *               if result is not NotImplemented:
 *                   return result
 *           ... composed path ...
 *
 *       adapter_names or alora_offsets among kwargs give NotImplemented, so they need not be taken out first. Merged
 * or disabled layers run the base layer alone; disabled while merged gives NotImplemented. Errors of the base layer
 * propagate.
 *
 *   lowrank_apply(y, x, t, scales, factors) -> None
 *       y (..., n) += sum_i scales[i] (x A_i^T) B_i^T in place, factors = (A_0, B_0, A_1, ...); t: None, or (m, sum
 * r_i) float32 (float64) that receives x A^T. lowrank_backward(g, x, t, scales, factors, dx, grads) -> bool Fills dx
 * (..., k) and grads = (dA_0, dB_0, ...), each a tensor or None. x may be None without dA; t may be None without dB.
 * False: a tensor has no view (nothing written). */
#ifndef PEFT_C_FORWARD_H
#define PEFT_C_FORWARD_H

#include "gate.h"

/* From how many multiply-adds on, reading the factors counted as FORWARD_READING rows, a kernel runs without the GIL, in
 * torch's threads. */
enum { FORWARD_PARALLEL = 200000, FORWARD_READING = 8 };

/* One call of the forward kernel: y (m, n) += terms of x (m, k); t: NULL data, or (m, R). */
typedef struct {
    pk_mat y, x, t;
    pk_lowrank factors[GATE_MAX_TERMS];
    int count;
} forward_product;

/* Runs it; 0, or -1 with an exception. */
int forward_run(const module_state *state, const forward_product *product);

/* The term's weights as a factor; false when they have no plain 2-d view or do not fit each other. */
bool forward_factor(const module_state *state, const gate_term *term, pk_lowrank *out);

/* Would autograd have to see what is computed from x with these terms now? */
bool forward_wants_graph(const module_state *state, const gate_plan *plan, PyObject *x);

/* base(x, *args, **kwargs) plus the plan's terms, which fit x (gate_input); args and kwargs may be NULL. New reference,
 * or NULL with an exception. */
PyObject *forward_planned(module_state *state, const gate_plan *plan, PyObject *x, PyObject *args, PyObject *kwargs);

extern PyMethodDef terms_methods[];   /* lowrank_terms */
extern PyMethodDef forward_methods[]; /* lowrank_forward, lowrank_apply, lowrank_backward */

#endif
