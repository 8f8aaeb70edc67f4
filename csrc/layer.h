/* layer.h: the C base of BaseTunerLayer, `_C.Layer`, and its three switches, for one layer each.
 *
 * layer_* act on any object that has BaseTunerLayer's attributes. Where the object's class overrides the method of the
 * same name they call that instead. `names` is what the user gave, and was given to switch_names. 0, or -1 with an
 * exception. */
#ifndef PEFT_C_LAYER_H
#define PEFT_C_LAYER_H

#include "grads.h"

int layer_init(PyObject *module, module_state *state);

int layer_set_adapter(switch_call *call, PyObject *layer, PyObject *names, int inference_mode);
int layer_enable_adapters(switch_call *call, PyObject *layer, PyObject *names, int enabled);
int layer_set_requires_grad(switch_call *call, PyObject *layer, PyObject *names, int flag);

#endif
