/* mixed.h: a batch whose rows use different adapters, and the names of the adapters of its rows.
 *
 *   lowrank_mixed(layer, x, y, names) -> Tensor or None
 *       y[i] += scaling * B(A(x[i])) of the adapter names[i], in place, for every row i of the first dimension whose
 *       adapter the layer has; other rows ("__base__") stay as they are. Returns y. With y None the output of the base
 *       layer, if that is a plain nn.Linear, is computed, too. Rows beside each other with one adapter are one kernel
 *       call. None: nothing was written, take the composed path (the gate says no, autograd is needed, dropout is active).
 *
 *   lookup_add(y, x, terms) -> bool
 *       The same for an embedding: y[i] += scale * A[:, x[i]]^T B^T for every row i of the first dimension of the ids x
 *       with terms[i] = (A, B, scale), and not None. y is fresh memory. False: nothing was written, and it is not for C
 *       (types, layouts, an id outside of A). Whether C may act (may_act, autograd) is the caller's to know. */
#ifndef PEFT_C_MIXED_H
#define PEFT_C_MIXED_H

#include "forward.h"

extern PyMethodDef mixed_methods[]; /* lowrank_mixed, lookup_add */

#endif
