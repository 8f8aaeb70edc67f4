/* layer.h: the C base of BaseTunerLayer, `_C.Layer`, and its three switches, for a list of layers.
 *
 * A layer is any object that has BaseTunerLayer's attributes. Where its class overrides the method of the same name as
 * the switch, that is called instead, before anything else changes. */
#ifndef PEFT_C_LAYER_H
#define PEFT_C_LAYER_H

#include "grads.h"

int layer_init(PyObject *module, module_state *state);

/* layer.set_adapter(names, inference_mode=flag), .enable_adapters(flag) or .set_requires_grad(names, flag), which `method`
 * (see classes.h) says, for all of `layers`; takes everything back if one fails. Containers that are not open yet are
 * opened in `pool`. 0, or -1 with an exception. */
int layers_switch(const module_state *state, int method, tuned_layer *const *layers, size_t size, container_pool *pool,
                  PyObject *names, int flag);
/* [(tensor, requires_grad)] of the entries of one layer that may be trainable and of those of the adapters in `also`,
 * without those in `skip` (a set): new reference. */
PyObject *layer_flags(const module_state *state, PyObject *layer, PyObject *also, PyObject *skip);

#endif
