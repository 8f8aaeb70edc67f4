/* layer.c: `_C.Layer`, the bookkeeping of a tuner layer, on its live __dict__. In Python it would read
 *
 *   class Layer:
 *       def set_adapter(self, adapter_names, inference_mode=False):
 *           names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
 *           for container in map(self.__getattribute__, self.adapter_layer_names):
 *               for name, entry in container.items():
 *                   entry.requires_grad_(name in names and not inference_mode)
 *           self._freeze_non_trainable_peft_weights(names)
 *           self._active_adapter = names
 *       def enable_adapters(self, enabled):           # freezes all entries; enabling restores what was trainable
 *       def set_requires_grad(self, adapter_names, requires_grad=True):
 */
#include "layer.h"

/* What the switches below work on. */
typedef struct {
    const class_facts *facts; /* borrowed */
    PyObject *layer;          /* borrowed */
    PyObject *dict;           /* owned: its __dict__ */
} target;

/* Freezes what frozen_peft_weight_names declares for `names` (an iterable; NULL: the active ones). */
static int freeze(switch_call *call, const target *self, PyObject *names) {
    PyObject *frozen = layer_attribute(call->state, self->facts, self->layer, self->dict, FROZEN_NAMES);
    PyObject *active = NULL;
    int rc = frozen ? PyObject_IsTrue(frozen) : -1;
    if (rc > 0 && names == NULL) {
        names = active = PyObject_GetAttr(self->layer, call->state->names.active_adapters);
    }
    if (rc > 0) rc = names ? grads_freeze(call, self->facts, self->layer, self->dict, frozen, names) : -1;
    Py_XDECREF(frozen);
    Py_XDECREF(active);
    return rc;
}

/* The same, by the layer's own method if it has one. */
static int freeze_declared(switch_call *call, const target *self, PyObject *names) {
    if (!(self->facts->own & 1u << FREEZE)) return freeze(call, self, names);
    PyObject *active = names ? Py_NewRef(names) : PyObject_GetAttr(self->layer, call->state->names.active_adapters);
    PyObject *list = active ? PySequence_List(active) : NULL, *done = NULL;
    if (list != NULL) done = PyObject_CallMethod(self->layer, "_freeze_non_trainable_peft_weights", "(O)", list);
    Py_XDECREF(active);
    Py_XDECREF(list);
    Py_XDECREF(done);
    return done ? 0 : -1;
}

/* 1 if layer.__dict__["_disable_adapters"] is true. */
static int disabled(switch_call *call, const target *self) {
    PyObject *flag = PyDict_GetItemWithError(self->dict, call->state->names._disable_adapters);
    return flag != NULL ? PyObject_IsTrue(flag) : PyErr_Occurred() ? -1 : 0;
}

/* What was trainable before disabling (borrowed), or NULL (exception set only on failure). */
static PyObject *memory_of(switch_call *call, const target *self) {
    PyObject *memory = PyDict_GetItemWithError(self->dict, call->state->names._disabled_trainable);
    return memory != NULL && PyTuple_Check(memory) ? memory : NULL;
}

/* --- the switches --- */

static int set_adapter(switch_call *call, const target *self, int inference_mode) {
    const module_state *state = call->state;
    int rc = -1;
    PyObject *list = PySequence_List(call->names), *memory = NULL;
    if (list == NULL || grads_set_adapter(call, self->facts, self->layer, self->dict, inference_mode) < 0) goto done;
    if (freeze_declared(call, self, list) < 0) goto done;
    const int off = disabled(call, self);
    if (off < 0) goto done;
    if (off) { /* the choice made now is what enabling shall restore: the default, or nothing */
        if (inference_mode && (memory = PyTuple_New(0)) == NULL) goto done;
        if (dict_write(&call->log, self->dict, state->names._disabled_trainable, memory) < 0) goto done;
    }
    rc = dict_write(&call->log, self->dict, state->names._active_adapter, list);
done:
    Py_XDECREF(list);
    Py_XDECREF(memory);
    return rc;
}

static int disable(switch_call *call, const target *self) {
    const int off = disabled(call, self);
    if (off < 0 || grads_disable(call, self->facts, self->layer, self->dict, !off) < 0) return -1;
    return dict_write(&call->log, self->dict, call->state->names._disable_adapters, Py_True);
}

/* Calls the layer's own set_adapter(names, inference_mode=...). */
static int own_set_adapter(switch_call *call, PyObject *layer, PyObject *names, int inference_mode) {
    PyObject *method = PyObject_GetAttr(layer, call->state->names.set_adapter), *done = NULL;
    PyObject *args = PyTuple_Pack(1, names), *kwargs = PyDict_New();
    if (method != NULL && args != NULL && kwargs != NULL &&
        PyDict_SetItem(kwargs, call->state->names.inference_mode, inference_mode ? Py_True : Py_False) == 0) {
        done = PyObject_Call(method, args, kwargs);
    }
    Py_XDECREF(method);
    Py_XDECREF(args);
    Py_XDECREF(kwargs);
    Py_XDECREF(done);
    return done ? 0 : -1;
}

/* Activates what is active already, for which a set_adapter of the layer's own is called. */
static int activate(switch_call *call, const target *self, PyObject *active) {
    if (self->facts->own & 1u << SET_ADAPTER) return own_set_adapter(call, self->layer, active, 0);
    return switch_names(call, active) < 0 ? -1 : set_adapter(call, self, 0);
}

static int enable(switch_call *call, const target *self) {
    int rc = -1;
    const int off = disabled(call, self), own = (self->facts->own & 1u << SET_ADAPTER) != 0;
    PyObject *memory = off > 0 ? memory_of(call, self) : NULL, *active = NULL;
    if (PyErr_Occurred()) return -1;
    Py_XINCREF(memory);
    if (memory == NULL || own) {
        active = PyObject_GetAttr(self->layer, call->state->names.active_adapters);
        if (active == NULL || activate(call, self, active) < 0) goto done;
    }
    if (memory != NULL) {
        if (grads_restore(call, self->facts, self->layer, self->dict, memory, active) < 0) goto done;
        if (freeze_declared(call, self, NULL) < 0) goto done;
    }
    rc = dict_write(&call->log, self->dict, call->state->names._disable_adapters, Py_False);
done:
    Py_XDECREF(active);
    Py_XDECREF(memory);
    return rc;
}

/* Removes the adapters in call->names from what enabling restores. */
static int memory_forget(switch_call *call, const target *self) {
    PyObject *memory = memory_of(call, self);
    if (memory == NULL) return PyErr_Occurred() ? -1 : 0;
    int rc = -1;
    PyObject *list = PyList_New(0), *kept = NULL;
    for (Py_ssize_t i = 0; list != NULL && i < PyTuple_Size(memory); i++) {
        PyObject *pair = PyTuple_GetItem(memory, i), *name = PyTuple_GetItem(pair, 1);
        const int listed = name ? PySequence_Contains(call->names, name) : -1;
        if (listed < 0 || (!listed && PyList_Append(list, pair) < 0)) goto done;
    }
    if (list != NULL && (kept = PyList_AsTuple(list)) != NULL) {
        rc = dict_write(&call->log, self->dict, call->state->names._disabled_trainable, kept);
    }
done:
    Py_XDECREF(list);
    Py_XDECREF(kept);
    return rc;
}

static int set_requires_grad(switch_call *call, const target *self, int flag) {
    if (grads_set(call, self->facts, self->layer, self->dict, flag) < 0) return -1;
    return flag ? freeze_declared(call, self, call->names) : memory_forget(call, self);
}

/* Opens a layer for a switch that is its method `method`. 1: done; 0: its class has a method of its own; -1: exception. */
static int target_open(switch_call *call, PyObject *layer, int method, target *self) {
    const class_facts *facts = class_of(call->state, &call->classes, Py_TYPE(layer));
    if (facts == NULL || (method < METHODS && (facts->own & 1u << method))) return facts ? 0 : -1;
    *self = (target){facts, layer, PyObject_GenericGetDict(layer, NULL)};
    return self->dict ? 1 : -1;
}

int layer_set_adapter(switch_call *call, PyObject *layer, PyObject *names, int inference_mode) {
    target self;
    const int opened = target_open(call, layer, SET_ADAPTER, &self);
    if (opened <= 0) return opened < 0 ? -1 : own_set_adapter(call, layer, names, inference_mode);
    const int rc = set_adapter(call, &self, inference_mode);
    Py_DECREF(self.dict);
    return rc;
}

int layer_enable_adapters(switch_call *call, PyObject *layer, PyObject *names, int enabled) {
    (void)names;
    target self;
    PyObject *done;
    const int opened = target_open(call, layer, ENABLE_ADAPTERS, &self);
    if (opened < 0) return -1;
    if (opened > 0) {
        const int rc = enabled ? enable(call, &self) : disable(call, &self);
        Py_DECREF(self.dict);
        return rc;
    }
    done = PyObject_CallMethodObjArgs(layer, call->state->names.enable_adapters, enabled ? Py_True : Py_False, NULL);
    Py_XDECREF(done);
    return done ? 0 : -1;
}

int layer_set_requires_grad(switch_call *call, PyObject *layer, PyObject *names, int flag) {
    target self;
    PyObject *done;
    const int opened = target_open(call, layer, SET_REQUIRES_GRAD, &self);
    if (opened < 0) return -1;
    if (opened > 0) {
        const int rc = set_requires_grad(call, &self, flag);
        Py_DECREF(self.dict);
        return rc;
    }
    done = PyObject_CallMethod(layer, "set_requires_grad", "OO", names, flag ? Py_True : Py_False);
    Py_XDECREF(done);
    return done ? 0 : -1;
}

/* --- the Python type --- */

/* Reads (names, flag) by position or keyword; the names are required if `first` is not NULL, the flag if `required`. */
static int parse(PyObject *const *args, Py_ssize_t count, PyObject *keywords, const char *const *words,
                 PyObject **first, int *flag, int required) {
    PyObject *values[2] = {NULL, NULL};
    const Py_ssize_t named = keywords ? PyTuple_Size(keywords) : 0;
    const int skip = first == NULL;
    if (count + named > 2 - skip) {
        PyErr_Format(PyExc_TypeError, "%s() takes %d arguments but %zd were given", words[2], 2 - skip, count + named);
        return -1;
    }
    for (Py_ssize_t i = 0; i < count; i++) values[i + skip] = args[i];
    for (Py_ssize_t i = 0; i < named; i++) {
        PyObject *word = PyTuple_GetItem(keywords, i);
        int place = -1;
        for (int k = skip; k < 2; k++) {
            if (PyUnicode_CompareWithASCIIString(word, words[k]) == 0) place = k;
        }
        if (place < 0 || values[place] != NULL) {
            PyErr_Format(PyExc_TypeError, "%s() got an unexpected or repeated argument %R", words[2], word);
            return -1;
        }
        values[place] = args[count + i];
    }
    if ((first != NULL && values[0] == NULL) || (required && values[1] == NULL)) {
        PyErr_Format(PyExc_TypeError, "%s() needs the argument '%s'", words[2], words[required ? 1 : 0]);
        return -1;
    }
    if (first != NULL) *first = values[0];
    if (values[1] != NULL && (*flag = PyObject_IsTrue(values[1])) < 0) return -1;
    return 0;
}

static const module_state *state_of_class(PyTypeObject *cls) {
    return (const module_state *)PyType_GetModuleState(cls);
}

/* Ends the call of a method: None, or NULL after everything was taken back. */
static PyObject *finish(switch_call *call, target *self, int rc) {
    rc = switch_end(call, rc);
    Py_XDECREF(self->dict);
    if (rc < 0) return NULL;
    Py_RETURN_NONE;
}

/* Opens `layer` for its method in C, which a method of its own may have called. */
static int begin(switch_call *call, PyTypeObject *cls, PyObject *layer, target *self) {
    call->state = state_of_class(cls);
    return target_open(call, layer, METHODS, self) < 0 ? -1 : 0;
}

static PyObject *layer_py_set_adapter(PyObject *self, PyTypeObject *cls, PyObject *const *args, Py_ssize_t count,
                                      PyObject *keywords) {
    static const char *const words[] = {"adapter_names", "inference_mode", "set_adapter"};
    PyObject *names = NULL;
    int inference_mode = 0;
    switch_call call = {0};
    target layer = {0};
    if (parse(args, count, keywords, words, &names, &inference_mode, 0) < 0) return NULL;
    int rc = begin(&call, cls, self, &layer);
    if (rc == 0) rc = switch_names(&call, names);
    if (rc == 0) rc = set_adapter(&call, &layer, inference_mode);
    return finish(&call, &layer, rc);
}

static PyObject *layer_py_enable_adapters(PyObject *self, PyTypeObject *cls, PyObject *const *args, Py_ssize_t count,
                                          PyObject *keywords) {
    static const char *const words[] = {"", "enabled", "enable_adapters"};
    int enabled = 1;
    switch_call call = {0};
    target layer = {0};
    if (parse(args, count, keywords, words, NULL, &enabled, 1) < 0) return NULL;
    int rc = begin(&call, cls, self, &layer);
    if (rc == 0) rc = enabled ? enable(&call, &layer) : disable(&call, &layer);
    return finish(&call, &layer, rc);
}

static PyObject *layer_py_set_requires_grad(PyObject *self, PyTypeObject *cls, PyObject *const *args, Py_ssize_t count,
                                            PyObject *keywords) {
    static const char *const words[] = {"adapter_names", "requires_grad", "set_requires_grad"};
    PyObject *names = NULL;
    int flag = 1;
    switch_call call = {0};
    target layer = {0};
    if (parse(args, count, keywords, words, &names, &flag, 0) < 0) return NULL;
    int rc = begin(&call, cls, self, &layer);
    if (rc == 0) rc = switch_names(&call, names);
    if (rc == 0) rc = set_requires_grad(&call, &layer, flag);
    return finish(&call, &layer, rc);
}

static PyObject *layer_py_freeze(PyObject *self, PyTypeObject *cls, PyObject *const *args, Py_ssize_t count,
                                 PyObject *keywords) {
    switch_call call = {0};
    target layer = {0};
    if (count + (keywords ? PyTuple_Size(keywords) : 0) > 1) {
        PyErr_SetString(PyExc_TypeError, "_freeze_non_trainable_peft_weights() takes at most 1 argument");
        return NULL;
    }
    const int given = count + (keywords ? PyTuple_Size(keywords) : 0) == 1 && args[0] != Py_None;
    PyObject *names = NULL;
    int rc = begin(&call, cls, self, &layer);
    if (rc == 0 && given) rc = switch_names(&call, args[0]);
    if (rc == 0 && !given) names = PyObject_GetAttr(self, call.state->names.frozen_peft_weight_names);
    if (rc == 0) rc = given || names ? freeze(&call, &layer, given ? call.names : names) : -1;
    Py_XDECREF(names);
    return finish(&call, &layer, rc);
}

#define METHOD(name, function, doc) \
    { #name, (PyCFunction)(void (*)(void))function, METH_METHOD | METH_FASTCALL | METH_KEYWORDS, doc }

static PyMethodDef layer_methods[] = {
    METHOD(set_adapter, layer_py_set_adapter,
           "set_adapter($self, /, adapter_names, inference_mode=False)\n--\n\n"
           "Makes the named adapters (a string or a list) the active ones: they take part in forward and, unless\n"
           "`inference_mode`, become trainable; all others are frozen."),
    METHOD(enable_adapters, layer_py_enable_adapters,
           "enable_adapters($self, /, enabled)\n--\n\n"
           "Switches all adapters of this layer on or off. Off freezes them; on restores what was trainable before."),
    METHOD(set_requires_grad, layer_py_set_requires_grad,
           "set_requires_grad($self, /, adapter_names, requires_grad=True)\n--\n\n"
           "Makes the weights of the named adapters (a string or several) trainable or frozen, active or not."),
    METHOD(_freeze_non_trainable_peft_weights, layer_py_freeze,
           "_freeze_non_trainable_peft_weights($self, /, adapter_names=None)\n--\n\n"
           "Freezes the weights that `frozen_peft_weight_names` declares for the named adapters (default: for all)."),
    {NULL, NULL, 0, NULL},
};

static PyType_Slot layer_slots[] = {
    {Py_tp_doc, "The bookkeeping of a tuner layer: the C base of BaseTunerLayer."},
    {Py_tp_methods, layer_methods},
    {0, NULL},
};

static PyType_Spec layer_spec = {
    .name = "peft_c._C.Layer",
    .basicsize = 0, /* as large as object: mixes with nn.Module and ABC */
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
    .slots = layer_slots,
};

int layer_init(PyObject *module, module_state *state) {
    state->types.LayerBase = PyType_FromModuleAndSpec(module, &layer_spec, NULL);
    return state->types.LayerBase ? PyModule_AddObjectRef(module, "Layer", state->types.LayerBase) : -1;
}
