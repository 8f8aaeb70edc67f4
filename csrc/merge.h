/* merge.h: adding adapters to one weight and taking them out again, in place, on live tensors. */
#ifndef PEFT_C_MERGE_H
#define PEFT_C_MERGE_H

#include "gate.h"

/* May C write to a weight now? `undo`: there is a record, which only the kernels can read, so the switch for fast paths
 * does not matter. */
bool merge_is_possible(const module_state *state, bool undo);

extern PyMethodDef merge_methods[];    /* merge_add, merge_subtract, merge_switch */
extern PyMethodDef exchange_methods[]; /* exchange, combine, uncombine, restore, digest, fingerprint */

#endif
