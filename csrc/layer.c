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

/* A switch: what it queues for a layer, and what it notes on the layer when the flags are turned. */
typedef struct {
    int (*plan)(switch_call *call, stage *work, target *self, int flag);
    int (*note)(switch_call *call, stage *work, target *self, int flag);
} layer_switch;

/* Does a switch to layers whose `facts`, `layer` and `dict` are given. */
static int perform(switch_call *call, const layer_switch *what, target *layers, size_t count, int flag) {
    stage work = {0};
    int rc = 0;
    for (size_t i = 0; rc == 0 && i < count; i++) {
        target *const self = &layers[i];
        rc = containers_find(call->state, self->facts, self->layer, self->dict, &work.pool, &self->in);
    }
    if (rc == 0) rc = containers_open(call->state, &work.pool);
    for (size_t i = 0; rc == 0 && i < count; i++) rc = what->plan(call, &work, &layers[i], flag);
    if (rc == 0) rc = work_run(call->state, &call->log, &work.work, NULL);
    for (size_t i = 0; rc == 0 && i < count; i++) rc = what->note(call, &work, &layers[i], flag);
    stage_free(&work);
    return rc;
}

/* Freezes what frozen_peft_weight_names declares for `names` (an iterable; NULL: the active ones). */
static int freeze(switch_call *call, const target *self, PyObject *names) {
    const module_state *state = call->state;
    PyObject *frozen = layer_attribute(state, self->facts, self->layer, self->dict, FROZEN_NAMES), *active = NULL;
    int rc = frozen ? PyObject_IsTrue(frozen) : -1;
    if (rc > 0) {
        stage work = {0};
        target inner = {self->facts, self->layer, self->dict, .in = {0}};
        if (names == NULL) names = active = PyObject_GetAttr(self->layer, state->names.active_adapters);
        rc = names ? containers_find(state, self->facts, self->layer, self->dict, &work.pool, &inner.in) : -1;
        if (rc == 0) rc = containers_open(state, &work.pool);
        if (rc == 0) rc = grads_plan_freeze(&work, &inner, frozen, names);
        if (rc == 0) rc = work_run(state, &call->log, &work.work, NULL);
        Py_XDECREF(inner.in.names);
        stage_free(&work);
    }
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

static int note_set_adapter(switch_call *call, stage *work, target *self, int inference_mode) {
    const module_state *state = call->state;
    int rc = -1;
    PyObject *list = PySequence_List(call->names), *memory = NULL;
    if (list == NULL || grads_note_set_adapter(call, work, self, inference_mode) < 0) goto done;
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

static const layer_switch set_adapter = {grads_plan_set_adapter, note_set_adapter};

/* Calls the layer's own set_adapter(names, inference_mode=...). */
static int own_set_adapter(const module_state *state, PyObject *layer, PyObject *names, int inference_mode) {
    PyObject *method = PyObject_GetAttr(layer, state->names.set_adapter), *done = NULL;
    PyObject *args = PyTuple_Pack(1, names), *kwargs = PyDict_New();
    if (method != NULL && args != NULL && kwargs != NULL &&
        PyDict_SetItem(kwargs, state->names.inference_mode, inference_mode ? Py_True : Py_False) == 0) {
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
    if (self->facts->own & 1u << SET_ADAPTER) return own_set_adapter(call->state, self->layer, active, 0);
    target inner = {self->facts, Py_NewRef(self->layer), Py_NewRef(self->dict), .in = {0}};
    int rc = switch_names(call, active);
    if (rc == 0) rc = perform(call, &set_adapter, &inner, 1, 0);
    target_free(&inner);
    return rc;
}

static int plan_enable(switch_call *call, stage *work, target *self) {
    int rc = -1;
    const int off = disabled(call, self), own = (self->facts->own & 1u << SET_ADAPTER) != 0;
    PyObject *active = NULL;
    self->memory = off > 0 ? memory_of(call, self) : NULL;
    Py_XINCREF(self->memory);
    if (PyErr_Occurred()) return -1;
    if (self->memory == NULL || own) {
        active = PyObject_GetAttr(self->layer, call->state->names.active_adapters);
        if (active == NULL || activate(call, self, active) < 0) goto done;
    }
    rc = self->memory ? grads_plan_restore(call, work, self, self->memory, active) : 0;
done:
    Py_XDECREF(active);
    return rc;
}

static int plan_enable_adapters(switch_call *call, stage *work, target *self, int enabled) {
    return enabled ? plan_enable(call, work, self) : grads_plan_disable(call, work, self);
}

static int note_enable_adapters(switch_call *call, stage *work, target *self, int enabled) {
    (void)work;
    const module_state *state = call->state;
    if (enabled) {
        if (self->memory != NULL && freeze_declared(call, self, NULL) < 0) return -1;
        if (dict_write(&call->log, self->dict, state->names._disabled_trainable, NULL) < 0) return -1;
    } else {
        const int off = disabled(call, self);
        if (off < 0 || (!off && grads_note_disable(call, self) < 0)) return -1;
    }
    return dict_write(&call->log, self->dict, state->names._disable_adapters, enabled ? Py_False : Py_True);
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

static int note_set_requires_grad(switch_call *call, stage *work, target *self, int flag) {
    (void)work;
    return flag ? freeze_declared(call, self, call->names) : memory_forget(call, self);
}

static const layer_switch *switch_of(int method) {
    static const layer_switch enable = {plan_enable_adapters, note_enable_adapters};
    static const layer_switch set_grad = {grads_plan_set, note_set_requires_grad};
    return method == SET_ADAPTER ? &set_adapter : method == ENABLE_ADAPTERS ? &enable : &set_grad;
}

/* Calls the layer's own method. */
static int own_method(const module_state *state, int method, PyObject *layer, PyObject *names, int flag) {
    if (method == SET_ADAPTER) return own_set_adapter(state, layer, names, flag);
    PyObject *const value = flag ? Py_True : Py_False;
    PyObject *done = method == ENABLE_ADAPTERS
                         ? PyObject_CallMethodObjArgs(layer, state->names.enable_adapters, value, NULL)
                         : PyObject_CallMethodObjArgs(layer, state->names.set_requires_grad, names, value, NULL);
    Py_XDECREF(done);
    return done ? 0 : -1;
}

static int target_open(switch_call *call, PyObject *layer, target *self) {
    *self = (target){class_of(call->state, &call->classes, Py_TYPE(layer)), Py_NewRef(layer), NULL, .in = {0}};
    if (self->facts != NULL) self->dict = PyObject_GenericGetDict(layer, NULL);
    return self->dict ? 0 : -1;
}

int layers_switch(const module_state *state, int method, PyObject *layers, PyObject *names, int flag) {
    switch_call call = {.state = state};
    size_t count = 0;
    const Py_ssize_t size = PyList_Size(layers);
    target *targets = PyMem_Calloc((size_t)size + 1, sizeof *targets);
    int rc = targets ? 0 : -1;
    if (targets == NULL) PyErr_NoMemory();
    if (rc == 0 && names != NULL) rc = switch_names(&call, names);
    for (Py_ssize_t i = 0; rc == 0 && i < size && i < PyList_Size(layers); i++) {
        target *const self = &targets[count++];
        rc = target_open(&call, PyList_GetItem(layers, i), self);
        if (rc == 0) PREFETCH(self->dict);
        if (rc == 0 && (self->facts->own & 1u << method)) {
            rc = own_method(state, method, self->layer, names, flag);
            target_free(&targets[--count]);
        }
    }
    if (rc == 0) rc = perform(&call, switch_of(method), targets, count, flag);
    while (count > 0) target_free(&targets[--count]);
    PyMem_Free(targets);
    return switch_end(&call, rc);
}

PyObject *layer_flags(const module_state *state, PyObject *layer, PyObject *also, PyObject *skip) {
    switch_call call = {.state = state};
    stage work = {0};
    target self;
    PyObject *list = PyList_New(0);
    int rc = target_open(&call, layer, &self);
    if (rc == 0 && list != NULL) rc = switch_names(&call, also);
    if (rc == 0) rc = containers_find(state, self.facts, layer, self.dict, &work.pool, &self.in);
    if (rc == 0) rc = containers_open(state, &work.pool);
    if (rc == 0) rc = grads_plan_list(&call, &work, &self, skip);
    if (rc == 0) rc = work_run(state, &call.log, &work.work, list);
    if (rc < 0) Py_CLEAR(list);
    target_free(&self);
    stage_free(&work);
    switch_end(&call, rc);
    return list;
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
    target_free(self);
    if (switch_end(call, rc) < 0) return NULL;
    Py_RETURN_NONE;
}

/* Runs a switch's method in C, which a method of its own may have called. */
static PyObject *run(PyTypeObject *cls, int method, PyObject *layer, PyObject *names, int flag) {
    switch_call call = {.state = state_of_class(cls)};
    target self;
    int rc = target_open(&call, layer, &self);
    if (rc == 0 && names != NULL) rc = switch_names(&call, names);
    if (rc == 0) rc = perform(&call, switch_of(method), &self, 1, flag);
    return finish(&call, &self, rc);
}

static PyObject *layer_py_set_adapter(PyObject *self, PyTypeObject *cls, PyObject *const *args, Py_ssize_t count,
                                      PyObject *keywords) {
    static const char *const words[] = {"adapter_names", "inference_mode", "set_adapter"};
    PyObject *names = NULL;
    int inference_mode = 0;
    if (parse(args, count, keywords, words, &names, &inference_mode, 0) < 0) return NULL;
    return run(cls, SET_ADAPTER, self, names, inference_mode);
}

static PyObject *layer_py_enable_adapters(PyObject *self, PyTypeObject *cls, PyObject *const *args, Py_ssize_t count,
                                          PyObject *keywords) {
    static const char *const words[] = {"", "enabled", "enable_adapters"};
    int enabled = 1;
    if (parse(args, count, keywords, words, NULL, &enabled, 1) < 0) return NULL;
    return run(cls, ENABLE_ADAPTERS, self, NULL, enabled);
}

static PyObject *layer_py_set_requires_grad(PyObject *self, PyTypeObject *cls, PyObject *const *args, Py_ssize_t count,
                                            PyObject *keywords) {
    static const char *const words[] = {"adapter_names", "requires_grad", "set_requires_grad"};
    PyObject *names = NULL;
    int flag = 1;
    if (parse(args, count, keywords, words, &names, &flag, 0) < 0) return NULL;
    return run(cls, SET_REQUIRES_GRAD, self, names, flag);
}

static PyObject *layer_py_freeze(PyObject *self, PyTypeObject *cls, PyObject *const *args, Py_ssize_t count,
                                 PyObject *keywords) {
    if (count + (keywords ? PyTuple_Size(keywords) : 0) > 1) {
        PyErr_SetString(PyExc_TypeError, "_freeze_non_trainable_peft_weights() takes at most 1 argument");
        return NULL;
    }
    const int given = count + (keywords ? PyTuple_Size(keywords) : 0) == 1 && args[0] != Py_None;
    switch_call call = {.state = state_of_class(cls)};
    target layer;
    PyObject *names = NULL;
    int rc = target_open(&call, self, &layer);
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
