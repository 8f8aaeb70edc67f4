/* merge.h: adding adapters to one weight and taking them out again, in place, on live tensors. */
#ifndef PEFT_C_MERGE_H
#define PEFT_C_MERGE_H

#include "gate.h"

extern PyMethodDef merge_methods[]; /* merge_add, merge_subtract, merge_switch */

#endif
