/* layer.h: the C base of BaseTunerLayer, `_C.Layer`, and its three switches, for one layer each.
 *
 * layer_* act on any object that has BaseTunerLayer's attributes. Where the object's class overrides the method of the
 * same name they call that instead. 0, or -1 with an exception. `log` may be NULL. */
#ifndef PEFT_C_LAYER_H
#define PEFT_C_LAYER_H

#include "journal.h"

int layer_init(PyObject *module, module_state *state);

int layer_set_adapter(const module_state *state, journal *log, PyObject *layer, PyObject *names, int inference_mode);
int layer_enable_adapters(const module_state *state, journal *log, PyObject *layer, int enabled);
int layer_set_requires_grad(const module_state *state, journal *log, PyObject *layer, PyObject *names, int flag);

#endif
