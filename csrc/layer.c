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

#include "grads.h"

enum { SET_ADAPTER, ENABLE_ADAPTERS, SET_REQUIRES_GRAD, FREEZE };

/* Whether the class of `layer` has its own version of a method (1, 0, or -1 with an exception). */
static int overridden(const module_state *state, journal *log, PyObject *layer, int method) {
    PyTypeObject *const type = Py_TYPE(layer);
    const unsigned bit = 1u << method;
    if (log != NULL && log->type != type) log->known = 0, log->type = type;
    if (log != NULL && (log->known & bit)) return (log->own & bit) != 0;
    PyObject *const names[] = {state->names.set_adapter, state->names.enable_adapters, state->names.set_requires_grad,
                               state->names._freeze_non_trainable_peft_weights};
    PyObject *own = PyObject_GetAttr((PyObject *)type, names[method]);
    PyObject *base = own ? PyObject_GetAttr(state->types.LayerBase, names[method]) : NULL;
    const int result = base == NULL ? -1 : own != base;
    Py_XDECREF(own);
    Py_XDECREF(base);
    if (log != NULL && result >= 0) {
        log->known |= bit;
        log->own = result ? log->own | bit : log->own & ~bit;
    }
    return result;
}

/* names as a new list: of one string, or of an iterable. */
static PyObject *names_list(PyObject *names) {
    if (!PyUnicode_Check(names)) return PySequence_List(names);
    PyObject *list = PyList_New(1);
    if (list == NULL) return NULL;
    Py_INCREF(names);
    PyList_SetItem(list, 0, names);
    return list;
}

static PyObject *names_set(PyObject *names) {
    PyObject *list = names_list(names), *set = list ? PyFrozenSet_New(list) : NULL;
    Py_XDECREF(list);
    return set;
}

/* Freezes what frozen_peft_weight_names declares for `names` (a list or set; NULL: for all). */
static int freeze(const module_state *state, journal *log, PyObject *layer, PyObject *names) {
    PyObject *frozen = PyObject_GetAttr(layer, state->names.frozen_peft_weight_names), *dict = NULL;
    int rc = frozen ? PyObject_IsTrue(frozen) : -1;
    if (rc > 0) {
        dict = PyObject_GenericGetDict(layer, NULL);
        rc = dict ? grads_freeze(state, log, layer, dict, frozen, names ? names : frozen) : -1;
    }
    Py_XDECREF(frozen);
    Py_XDECREF(dict);
    return rc;
}

static int freeze_declared(const module_state *state, journal *log, PyObject *layer, PyObject *names) {
    const int own = overridden(state, log, layer, FREEZE);
    if (own <= 0) return own < 0 ? -1 : freeze(state, log, layer, names);
    PyObject *done = PyObject_CallMethodObjArgs(layer, state->names._freeze_non_trainable_peft_weights, names, NULL);
    Py_XDECREF(done);
    return done ? 0 : -1;
}

/* 1 if layer.__dict__["_disable_adapters"] is true. */
static int disabled(const module_state *state, PyObject *dict) {
    PyObject *flag = PyDict_GetItemWithError(dict, state->names._disable_adapters);
    return flag != NULL ? PyObject_IsTrue(flag) : PyErr_Occurred() ? -1 : 0;
}

/* What was trainable before disabling (borrowed), or NULL (exception set only on failure). */
static PyObject *memory_of(const module_state *state, PyObject *dict) {
    PyObject *memory = PyDict_GetItemWithError(dict, state->names._disabled_trainable);
    return memory != NULL && PyTuple_Check(memory) ? memory : NULL;
}

/* --- the switches --- */

static int set_adapter(const module_state *state, journal *log, PyObject *layer, PyObject *names, int inference_mode) {
    int rc = -1;
    PyObject *dict = PyObject_GenericGetDict(layer, NULL), *list = dict ? names_list(names) : NULL, *memory = NULL;
    if (list == NULL) goto done;
    if (grads_set_adapter(state, log, layer, dict, list, inference_mode) < 0) goto done;
    if (freeze_declared(state, log, layer, list) < 0) goto done;
    const int off = disabled(state, dict);
    if (off < 0) goto done;
    if (off) { /* the choice made now is what enabling shall restore: the default, or nothing */
        if (inference_mode && (memory = PyTuple_New(0)) == NULL) goto done;
        if (dict_write(log, dict, state->names._disabled_trainable, memory) < 0) goto done;
    }
    rc = dict_write(log, dict, state->names._active_adapter, list);
done:
    Py_XDECREF(dict);
    Py_XDECREF(list);
    Py_XDECREF(memory);
    return rc;
}

int layer_set_adapter(const module_state *state, journal *log, PyObject *layer, PyObject *names, int inference_mode) {
    const int own = overridden(state, log, layer, SET_ADAPTER);
    if (own <= 0) return own < 0 ? -1 : set_adapter(state, log, layer, names, inference_mode);
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

static int disable(const module_state *state, journal *log, PyObject *layer, PyObject *dict) {
    const int off = disabled(state, dict);
    if (off < 0 || grads_disable(state, log, layer, dict, !off) < 0) return -1;
    return dict_write(log, dict, state->names._disable_adapters, Py_True);
}

static int enable(const module_state *state, journal *log, PyObject *layer, PyObject *dict) {
    int rc = -1;
    PyObject *active = PyObject_GetAttr(layer, state->names.active_adapters), *memory = NULL, *frozen = NULL;
    if (active == NULL) goto done;
    const int off = disabled(state, dict), own = overridden(state, log, layer, SET_ADAPTER);
    if (off < 0 || own < 0) goto done;
    memory = off ? memory_of(state, dict) : NULL;
    Py_XINCREF(memory);
    if (memory == NULL || own) {
        if (PyErr_Occurred() || layer_set_adapter(state, log, layer, active, 0) < 0) goto done;
    }
    if (memory != NULL) {
        if (grads_restore(state, log, layer, dict, memory, own ? active : NULL) < 0) goto done;
        if (freeze_declared(state, log, layer, active) < 0) goto done;
    }
    rc = dict_write(log, dict, state->names._disable_adapters, Py_False);
done:
    Py_XDECREF(active);
    Py_XDECREF(memory);
    Py_XDECREF(frozen);
    return rc;
}

static int enable_adapters(const module_state *state, journal *log, PyObject *layer, int enabled) {
    PyObject *dict = PyObject_GenericGetDict(layer, NULL);
    if (dict == NULL) return -1;
    const int rc = enabled ? enable(state, log, layer, dict) : disable(state, log, layer, dict);
    Py_DECREF(dict);
    return rc;
}

int layer_enable_adapters(const module_state *state, journal *log, PyObject *layer, int enabled) {
    const int own = overridden(state, log, layer, ENABLE_ADAPTERS);
    if (own <= 0) return own < 0 ? -1 : enable_adapters(state, log, layer, enabled);
    PyObject *done =
        PyObject_CallMethodObjArgs(layer, state->names.enable_adapters, enabled ? Py_True : Py_False, NULL);
    Py_XDECREF(done);
    return done ? 0 : -1;
}

/* Removes the adapters in `names` from what enabling restores. */
static int memory_forget(const module_state *state, journal *log, PyObject *dict, PyObject *names) {
    PyObject *memory = memory_of(state, dict);
    if (memory == NULL) return PyErr_Occurred() ? -1 : 0;
    int rc = -1;
    PyObject *list = PyList_New(0), *kept = NULL;
    for (Py_ssize_t i = 0; list != NULL && i < PyTuple_Size(memory); i++) {
        PyObject *pair = PyTuple_GetItem(memory, i), *name = PyTuple_GetItem(pair, 1);
        const int listed = name ? PySequence_Contains(names, name) : -1;
        if (listed < 0 || (!listed && PyList_Append(list, pair) < 0)) goto done;
    }
    if (list != NULL && (kept = PyList_AsTuple(list)) != NULL) {
        rc = dict_write(log, dict, state->names._disabled_trainable, kept);
    }
done:
    Py_XDECREF(list);
    Py_XDECREF(kept);
    return rc;
}

static int set_requires_grad(const module_state *state, journal *log, PyObject *layer, PyObject *names, int flag) {
    int rc = -1;
    PyObject *dict = PyObject_GenericGetDict(layer, NULL), *set = dict ? names_set(names) : NULL;
    if (set == NULL || grads_set(state, log, layer, dict, set, flag) < 0) goto done;
    rc = flag ? freeze_declared(state, log, layer, set) : memory_forget(state, log, dict, set);
done:
    Py_XDECREF(dict);
    Py_XDECREF(set);
    return rc;
}

int layer_set_requires_grad(const module_state *state, journal *log, PyObject *layer, PyObject *names, int flag) {
    const int own = overridden(state, log, layer, SET_REQUIRES_GRAD);
    if (own <= 0) return own < 0 ? -1 : set_requires_grad(state, log, layer, names, flag);
    PyObject *done = PyObject_CallMethod(layer, "set_requires_grad", "OO", names, flag ? Py_True : Py_False);
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

static PyObject *none_or_null(int rc) {
    if (rc < 0) return NULL;
    Py_RETURN_NONE;
}

static PyObject *layer_py_set_adapter(PyObject *self, PyTypeObject *cls, PyObject *const *args, Py_ssize_t count,
                                      PyObject *keywords) {
    static const char *const words[] = {"adapter_names", "inference_mode", "set_adapter"};
    PyObject *names = NULL;
    int inference_mode = 0;
    if (parse(args, count, keywords, words, &names, &inference_mode, 0) < 0) return NULL;
    return none_or_null(set_adapter(state_of_class(cls), NULL, self, names, inference_mode));
}

static PyObject *layer_py_enable_adapters(PyObject *self, PyTypeObject *cls, PyObject *const *args, Py_ssize_t count,
                                          PyObject *keywords) {
    static const char *const words[] = {"", "enabled", "enable_adapters"};
    int enabled = 1;
    if (parse(args, count, keywords, words, NULL, &enabled, 1) < 0) return NULL;
    return none_or_null(enable_adapters(state_of_class(cls), NULL, self, enabled));
}

static PyObject *layer_py_set_requires_grad(PyObject *self, PyTypeObject *cls, PyObject *const *args, Py_ssize_t count,
                                            PyObject *keywords) {
    static const char *const words[] = {"adapter_names", "requires_grad", "set_requires_grad"};
    PyObject *names = NULL;
    int flag = 1;
    if (parse(args, count, keywords, words, &names, &flag, 0) < 0) return NULL;
    return none_or_null(set_requires_grad(state_of_class(cls), NULL, self, names, flag));
}

static PyObject *layer_py_freeze(PyObject *self, PyTypeObject *cls, PyObject *const *args, Py_ssize_t count,
                                 PyObject *keywords) {
    if (count + (keywords ? PyTuple_Size(keywords) : 0) > 1) {
        PyErr_SetString(PyExc_TypeError, "_freeze_non_trainable_peft_weights() takes at most 1 argument");
        return NULL;
    }
    const int given = count + (keywords ? PyTuple_Size(keywords) : 0) == 1 && args[0] != Py_None;
    PyObject *names = given ? names_list(args[0]) : NULL;
    const int rc = given && names == NULL ? -1 : freeze(state_of_class(cls), NULL, self, names);
    Py_XDECREF(names);
    return none_or_null(rc);
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
