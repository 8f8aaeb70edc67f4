/* forward.h: the low-rank forward of a layer.
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
 * propagate. */
#ifndef PEFT_C_FORWARD_H
#define PEFT_C_FORWARD_H

#include "forward_raw.h"

/* Would autograd have to see what is computed from x with these terms now? */
bool forward_wants_graph(const module_state *state, const gate_plan *plan, PyObject *x);

/* base(x, *args, **kwargs) plus the plan's terms, which fit x (gate_input); args and kwargs may be NULL. New reference,
 * or NULL with an exception. */
PyObject *forward_planned(module_state *state, const gate_plan *plan, PyObject *x, PyObject *args, PyObject *kwargs);

/* F.linear(x, plan->weight, plan->bias) in memory of its own, by a kernel where that is faster; x has a view (view_peek).
 * New reference, or NULL with an exception. */
PyObject *forward_base(module_state *state, const gate_plan *plan, PyObject *x);

extern PyMethodDef terms_methods[];   /* lowrank_terms, may_act */
extern PyMethodDef forward_methods[]; /* lowrank_forward */

#endif
