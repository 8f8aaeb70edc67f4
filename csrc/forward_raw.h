/* forward_raw.h: the low-rank kernels on tensors.
 *
 *   lowrank_apply(y, x, t, scales, factors) -> None
 *       y (..., n) += sum_i scales[i] (x A_i^T) B_i^T in place, factors = (A_0, B_0, A_1, ...); t: None, or
 *       (m, sum r_i) float32 (float64) that receives x A^T.
 *   lowrank_linear(x, weight, bias, t, scales, factors) -> Tensor
 *       F.linear(x, weight, bias) plus these terms, as a new tensor; for use where autograd does not look.
 *   linear_grad(g, weight, u=None, scales=(), factors=()) -> Tensor or None
 *       g @ weight + sum_i s_i (g B_i) A_i, the gradient of such a layer's input; None: torch's product is the one to
 *       take. u: None, or (m, sum r_i) float32 that receives g B.
 *   lowrank_backward(g, x, t, scales, factors, dx, grads, add=False, u=None) -> bool
 *       Fills dx (..., k), or adds to it, and grads = (dA_0, dB_0, ...), each a tensor or None. x may be None without
 *       dA; t may be None without dB; u = g B is used where dx is None. False: a tensor has no view (nothing written). */
#ifndef PEFT_C_FORWARD_RAW_H
#define PEFT_C_FORWARD_RAW_H

#include "gate.h"

/* From how many multiply-adds on, reading the factors counted as FORWARD_READING rows, a kernel runs without the GIL, in
 * torch's threads. */
enum { FORWARD_PARALLEL = 200000, FORWARD_READING = 8 };

/* One call of a forward kernel on x (m, k). FORWARD_ADD: y (m, n) += the terms; FORWARD_SET: y = the terms;
 * FORWARD_LAYER: y = the linear layer's output and the terms. t: NULL data, or (m, R). */
typedef enum { FORWARD_ADD, FORWARD_SET, FORWARD_LAYER } forward_kind;
typedef struct {
    forward_kind kind;
    pk_mat y, x, t;
    pk_mat weight, bias; /* of FORWARD_LAYER; bias with NULL data: none */
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

/* Is a kernel faster for a linear layer with this weight and bias (or None) than torch? The product's x is set. If so it
 * becomes one of FORWARD_LAYER. */
bool forward_takes_layer(const module_state *state, PyObject *weight, PyObject *bias, forward_product *product);

/* The linear layer's output and the product's terms (x, t, factors set) in new memory, without a graph. New reference;
 * NULL with an exception; Py_None, borrowed, if it is best to call F.linear and to add the terms. */
PyObject *forward_layer(const module_state *state, PyObject *x, PyObject *weight, PyObject *bias,
                        forward_product *product);

/* The term's weights as a factor; false when they have no plain 2-d view or do not fit each other. */
bool forward_factor(const module_state *state, const gate_term *term, pk_lowrank *out);

extern PyMethodDef forward_raw_methods[]; /* lowrank_apply, lowrank_linear, linear_grad, lowrank_backward */

#endif
