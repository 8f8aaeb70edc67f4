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

enum { AHEAD = 8 }; /* layers for which memory is asked for in advance */

/* A switch: what it queues for a layer, and what it notes on the layer when the flags are turned. */
typedef struct {
    int (*plan)(switch_call *call, stage *work, target *self, int flag);
    int (*note)(switch_call *call, stage *work, target *self, int flag);
} layer_switch;

/* Does a switch to layers whose containers are in `pool`. */
static int perform(switch_call *call, const layer_switch *what, target *layers, size_t count,
                   const container_pool *pool, int flag) {
    stage work = {.pool = pool, .work = {.past = count > AHEAD ? pool->past : NULL}};
    int rc = 0;
    size_t asked = 0;
    for (size_t i = 0; rc == 0 && i < count; i++) {
        if (work.work.past != NULL) asked = footprint_ask(work.work.past, asked, i + AHEAD, count);
        if (i + AHEAD < count) grads_prefetch(call, &work, &layers[i + AHEAD]);
        rc = what->plan(call, &work, &layers[i], flag);
    }
    if (rc == 0) rc = work_run(call->state, &call->log, &work.work, NULL);
    for (size_t i = 0; rc == 0 && i < count; i++) rc = what->note(call, &work, &layers[i], flag);
    work_free(&work.work);
    return rc;
}

/* Freezes what frozen_peft_weight_names declares for `names` (an iterable; NULL: the active ones). */
static int freeze(switch_call *call, const stage *opened, const target *self, PyObject *names) {
    tuned_layer *const of = self->of;
    PyObject *active = NULL, *frozen = layer_was_plain(of) ? Py_NewRef(of->facts->attributes[FROZEN_NAMES])
                                                           : layer_attribute(call->state, of->facts, of->object,
                                                                             of->dict, FROZEN_NAMES);
    int rc = frozen ? PyObject_IsTrue(frozen) : -1;
    if (rc > 0) {
        stage work = {.pool = opened->pool};
        if (names == NULL) names = active = PyObject_GetAttr(of->object, call->state->names.active_adapters);
        rc = names ? grads_plan_freeze(&work, self, frozen, names) : -1;
        if (rc == 0) rc = work_run(call->state, &call->log, &work.work, NULL);
        work_free(&work.work);
    }
    Py_XDECREF(frozen);
    Py_XDECREF(active);
    return rc;
}

/* The same, by the layer's own method if it has one. */
static int freeze_declared(switch_call *call, const stage *opened, const target *self, PyObject *names) {
    if (!layer_has_own(call->state, self->of, FREEZE)) return freeze(call, opened, self, names);
    PyObject *active =
        names ? Py_NewRef(names) : PyObject_GetAttr(self->of->object, call->state->names.active_adapters);
    PyObject *list = active ? PySequence_List(active) : NULL, *done = NULL;
    if (list != NULL) done = PyObject_CallMethod(self->of->object, "_freeze_non_trainable_peft_weights", "(O)", list);
    Py_XDECREF(active);
    Py_XDECREF(list);
    Py_XDECREF(done);
    return done ? 0 : -1;
}

/* 1 if layer.__dict__["_disable_adapters"] is true. */
static int disabled(switch_call *call, const target *self) {
    PyObject *flag = dict_get(self->of->dict, call->state->names._disable_adapters, &self->of->facts->hints[DISABLED]);
    return flag != NULL ? PyObject_IsTrue(flag) : PyErr_Occurred() ? -1 : 0;
}

/* What was trainable before disabling (borrowed), or NULL (exception set only on failure). */
static PyObject *memory_of(switch_call *call, const target *self) {
    PyObject *memory =
        dict_get(self->of->dict, call->state->names._disabled_trainable, &self->of->facts->hints[MEMORY]);
    return memory != NULL && PyTuple_Check(memory) ? memory : NULL;
}

/* --- the switches --- */

/* 1 if the active adapters are a list of call->names. */
static int is_active(const switch_call *call, PyObject *active) {
    Py_ssize_t left = active != NULL && PyList_CheckExact(active) ? PyList_Size(active) : -1;
    int same = left == PyTuple_Size(call->names);
    while (same > 0 && left-- > 0) {
        same = PyObject_RichCompareBool(PyList_GetItem(active, left), PyTuple_GetItem(call->names, left), Py_EQ);
    }
    return same;
}

static int note_set_adapter(switch_call *call, stage *work, target *self, int inference_mode) {
    const module_state *state = call->state;
    hint *const hints = self->of->facts->hints;
    PyObject *memory = NULL, *const dict = self->of->dict;
    if (grads_note_set_adapter(call, work, self, inference_mode) < 0) return -1;
    if (freeze_declared(call, work, self, call->names) < 0) return -1;
    const int off = disabled(call, self);
    if (off < 0) return -1;
    if (off) { /* the choice made now is what enabling shall restore: the default, or nothing */
        if (inference_mode && (memory = PyTuple_New(0)) == NULL) return -1;
        const int rc = memory_write(call, self, memory);
        Py_XDECREF(memory);
        if (rc < 0) return -1;
    }
    const int same = is_active(call, dict_get(dict, state->names._active_adapter, &hints[ACTIVE]));
    if (same != 0 || PyErr_Occurred()) return same > 0 ? 0 : -1;
    PyObject *list = PySequence_List(call->names);
    const int rc = list ? dict_write(&call->log, dict, state->names._active_adapter, list, &hints[ACTIVE]) : -1;
    Py_XDECREF(list);
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
static int activate(switch_call *call, const stage *opened, const target *self, PyObject *active) {
    tuned_layer *const of = self->of;
    if (layer_has_own(call->state, of, SET_ADAPTER)) return own_set_adapter(call->state, of->object, active, 0);
    target inner = {.of = of};
    int rc = switch_names(call, active);
    if (rc == 0) rc = perform(call, &set_adapter, &inner, 1, opened->pool, 0);
    target_free(&inner);
    return rc;
}

static int plan_enable(switch_call *call, stage *work, target *self) {
    int rc = -1;
    const int off = disabled(call, self), own = layer_has_own(call->state, self->of, SET_ADAPTER);
    PyObject *active = NULL;
    self->memory = off > 0 ? memory_of(call, self) : NULL;
    Py_XINCREF(self->memory);
    if (PyErr_Occurred()) return -1;
    if (self->memory == NULL || own) {
        active = PyObject_GetAttr(self->of->object, call->state->names.active_adapters);
        if (active == NULL || activate(call, work, self, active) < 0) goto done;
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
    const module_state *state = call->state;
    if (enabled) {
        if (self->memory != NULL && freeze_declared(call, work, self, NULL) < 0) return -1;
        if (memory_write(call, self, NULL) < 0) return -1;
    } else {
        const int off = disabled(call, self);
        if (off < 0 || (!off && grads_note_disable(call, self) < 0)) return -1;
    }
    return dict_write(&call->log, self->of->dict, state->names._disable_adapters, enabled ? Py_False : Py_True,
                      &self->of->facts->hints[DISABLED]);
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
        rc = memory_write(call, self, kept);
    }
done:
    Py_XDECREF(list);
    Py_XDECREF(kept);
    return rc;
}

static int note_set_requires_grad(switch_call *call, stage *work, target *self, int flag) {
    return flag ? freeze_declared(call, work, self, call->names) : memory_forget(call, self);
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

int layers_switch(const module_state *state, int method, tuned_layer *const *layers, size_t size, container_pool *pool,
                  PyObject *names, int flag) {
    switch_call call = {.state = state};
    size_t count = 0, closed = 0;
    target *targets = PyMem_Calloc(size + 1, sizeof *targets);
    tuned_layer **to_open = PyMem_Calloc(size + 1, sizeof *to_open);
    int rc = targets != NULL && to_open != NULL ? 0 : -1;
    if (rc < 0) PyErr_NoMemory();
    if (rc == 0 && names != NULL) rc = switch_names(&call, names);
    for (size_t i = 0; rc == 0 && i < size; i++) {
        if (layer_has_own(state, layers[i], method)) {
            rc = own_method(state, method, layers[i]->object, names, flag);
        } else {
            targets[count++].of = layers[i];
            if (layers[i]->names == NULL) to_open[closed++] = layers[i];
        }
    }
    if (rc == 0 && closed > 0) rc = containers_open(state, to_open, closed, pool);
    if (rc == 0) rc = perform(&call, switch_of(method), targets, count, pool, flag);
    while (count > 0) target_free(&targets[--count]);
    PyMem_Free(targets);
    PyMem_Free(to_open);
    return switch_end(&call, rc);
}

/* One layer in a call of its own. */
typedef struct {
    switch_call call;
    class_table classes;
    container_pool pool;
    tuned_layer layer;
    target self;
} single;

/* 0, or -1 with an exception; to be ended in both cases. */
static int single_start(single *one, const module_state *state, PyObject *layer, PyObject *names) {
    tuned_layer *const opened = &one->layer;
    *one = (single){.call = {.state = state, .alone = true}};
    one->self.of = opened;
    if (layer_open(state, &one->classes, layer, opened) < 0) return -1;
    if (names != NULL && switch_names(&one->call, names) < 0) return -1;
    return containers_open(state, &one->self.of, 1, &one->pool);
}

static int single_end(single *one, int rc) {
    target_free(&one->self);
    layer_close(&one->layer);
    containers_free(&one->pool);
    class_table_free(&one->classes);
    return switch_end(&one->call, rc);
}

PyObject *layer_flags(const module_state *state, PyObject *layer, PyObject *also, PyObject *skip) {
    single one;
    PyObject *list = PyList_New(0);
    int rc = single_start(&one, state, layer, also);
    stage work = {.pool = &one.pool};
    if (rc == 0) rc = list ? grads_plan_list(&one.call, &work, &one.self, skip) : -1;
    if (rc == 0) rc = work_run(state, &one.call.log, &work.work, list);
    if (rc < 0) Py_CLEAR(list);
    work_free(&work.work);
    single_end(&one, rc);
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
static PyObject *finish(single *one, int rc) {
    if (single_end(one, rc) < 0) return NULL;
    Py_RETURN_NONE;
}

/* Runs a switch's method in C, which a method of its own may have called. */
static PyObject *run(PyTypeObject *cls, int method, PyObject *layer, PyObject *names, int flag) {
    single one;
    int rc = single_start(&one, state_of_class(cls), layer, names);
    if (rc == 0) rc = perform(&one.call, switch_of(method), &one.self, 1, &one.pool, flag);
    return finish(&one, rc);
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
    single one;
    PyObject *names = NULL;
    int rc = single_start(&one, state_of_class(cls), self, given ? args[0] : NULL);
    if (rc == 0 && !given) {
        names = PyObject_GetAttr(self, one.call.state->names.frozen_peft_weight_names);
        rc = names ? 0 : -1;
    }
    const stage opened = {.pool = &one.pool};
    if (rc == 0) rc = freeze(&one.call, &opened, &one.self, given ? one.call.names : names);
    Py_XDECREF(names);
    return finish(&one, rc);
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
