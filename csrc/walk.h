/* walk.h: the live module tree, as model.modules() sees it, and the model-wide switches on it. */
#ifndef PEFT_C_WALK_H
#define PEFT_C_WALK_H

#include "state.h"

/* find, set_adapter, enable_adapters, set_requires_grad, flags */
extern PyMethodDef walk_methods[];

#endif
