/* forward_raw.h: the low-rank kernels on tensors.
 *
 *   lowrank_apply(y, x, t, scales, factors) -> None
 *       y (..., n) += sum_i scales[i] (x A_i^T) B_i^T in place, factors = (A_0, B_0, A_1, ...); t: None, or
 *       (m, sum r_i) float32 (float64) that receives x A^T.
 *   lowrank_linear(x, weight, bias, t, scales, factors) -> Tensor
 *       F.linear(x, weight, bias) plus these terms, as a new tensor; for use where autograd does not look.
 *   linear_grad(g, weight) -> Tensor or None
 *       g @ weight, the gradient of such a layer's input; None: torch's product is the one to take.
 *   lowrank_backward(g, x, t, scales, factors, dx, grads, add=False) -> bool
 *       Fills dx (..., k), or adds to it, and grads = (dA_0, dB_0, ...), each a tensor or None. x may be None without
 *       dA; t may be None without dB. False: a tensor has no view (nothing written). */
#ifndef PEFT_C_FORWARD_RAW_H
#define PEFT_C_FORWARD_RAW_H

#include "gate.h"

/* From how many multiply-adds on, reading the factors counted as FORWARD_READING rows, a kernel runs without the GIL, in
 * torch's threads. */
enum { FORWARD_PARALLEL = 200000, FORWARD_READING = 8 };

/* One call of the forward kernel: y (m, n) += terms of x (m, k), or y = a linear layer's output and the terms.
 * t: NULL data, or (m, R). */
typedef struct {
    pk_mat y, x, t;
    pk_mat weight, bias; /* the layer's; NULL data: none */
    pk_lowrank factors[GATE_MAX_TERMS];
    int count;
} forward_product;

/* Sets the exception of a kernel's result other than PK_OK. Returns -1. */
int forward_error(int rc);

/* Runs it; 0, or -1 with an exception. */
int forward_run(const module_state *state, const forward_product *product);

/* `tensor` as rows of its last dimension. When its leading strides are not one stride, a contiguous copy is made and
 * put into *copy (owned by the caller, to be released after the kernel). False, without an exception, when it has no
 * such view. */
bool forward_rows(const module_state *state, PyObject *tensor, pk_mat *out, PyObject **copy);

/* Puts a linear layer's weight and bias (or None) into the product, whose x is set, if a kernel does the whole layer
 * faster than torch; then y is to be memory for its output, as forward_empty makes it. */
bool forward_takes_layer(const module_state *state, PyObject *weight, PyObject *bias, forward_product *product);

/* An uninitialised tensor like x, of n columns. New reference, or NULL with an exception. */
PyObject *forward_empty(const module_state *state, PyObject *x, int64_t n);

/* The term's weights as a factor; false when they have no plain 2-d view or do not fit each other. */
bool forward_factor(const module_state *state, const gate_term *term, pk_lowrank *out);

extern PyMethodDef forward_raw_methods[]; /* lowrank_apply, lowrank_linear, linear_grad, lowrank_backward */

#endif
