/* grads.c: see grads.h. */
#include "grads.h"

#include "containers.h"

#include <string.h>

/* --- flags of tensors and of entries --- */

/* 1 or 0: the flag of a tensor; -1 with an exception. */
static int flag_of(const module_state *state, PyObject *tensor) {
    PyObject *flag = PyObject_GetAttr(tensor, state->names.requires_grad);
    if (flag == NULL) return -1;
    const int value = PyObject_IsTrue(flag);
    Py_DECREF(flag);
    return value;
}

static int tensor_set(const module_state *state, journal *log, PyObject *tensor, int flag) {
    const int old = flag_of(state, tensor);
    if (old < 0 || old == flag) return old < 0 ? -1 : 0;
    if (old) { /* results of a computation keep their flag */
        PyObject *leaf = PyObject_GetAttr(tensor, state->names.is_leaf);
        if (leaf == NULL) return -1;
        const int is_leaf = PyObject_IsTrue(leaf);
        Py_DECREF(leaf);
        if (is_leaf <= 0) return is_leaf;
    }
    if (PyObject_SetAttr(tensor, state->names.requires_grad, flag ? Py_True : Py_False) < 0) return -1;
    return log != NULL ? journal_add(log, tensor, NULL, flag ? Py_False : Py_True) : 0;
}

typedef struct {
    const module_state *state;
    journal *log;
    PyObject *list; /* visit_list: gets (tensor, flag) */
    int flag;       /* visit_set: the flag to set */
    int trainable;  /* visit_freeze: becomes 1 when a tensor was trainable */
} visit_context;

typedef int (*visit)(visit_context *context, PyObject *tensor);

static int visit_set(visit_context *context, PyObject *tensor) {
    return tensor_set(context->state, context->log, tensor, context->flag);
}

static int visit_freeze(visit_context *context, PyObject *tensor) {
    const int flag = flag_of(context->state, tensor);
    if (flag <= 0) return flag;
    context->trainable = 1;
    return tensor_set(context->state, context->log, tensor, 0);
}

static int visit_list(visit_context *context, PyObject *tensor) {
    const int flag = flag_of(context->state, tensor);
    if (flag < 0) return -1;
    PyObject *pair = PyTuple_Pack(2, tensor, flag ? Py_True : Py_False);
    if (pair == NULL) return -1;
    const int rc = PyList_Append(context->list, pair);
    Py_DECREF(pair);
    return rc;
}

static int each_of_iterable(PyObject *iterable, visit call, visit_context *context) {
    PyObject *iterator = PyObject_GetIter(iterable), *item = NULL;
    if (iterator == NULL) return -1;
    int rc = 0;
    while (rc == 0 && (item = PyIter_Next(iterator)) != NULL) {
        rc = call(context, item);
        Py_DECREF(item);
    }
    Py_DECREF(iterator);
    return rc < 0 || PyErr_Occurred() ? -1 : 0;
}

/* Calls `call` on every tensor of an entry: the tensor itself, or the parameters of a module. */
static int entry_visit(PyObject *entry, visit call, visit_context *context) {
    const module_state *state = context->state;
    PyTypeObject *type = Py_TYPE(entry);
    if ((PyObject *)type == state->objects.Parameter) return call(context, entry);
    if ((PyObject *)type != state->objects.Linear) {
        const int tensor = PyObject_IsInstance(entry, state->objects.Tensor);
        if (tensor != 0) return tensor < 0 ? -1 : call(context, entry);
    }
    int rc = -1;
    PyObject *dict = PyObject_GenericGetDict(entry, NULL), *parameters = NULL, *modules = NULL, *values = NULL;
    if (dict == NULL) PyErr_Clear();
    if (dict != NULL) parameters = PyDict_GetItemWithError(dict, state->names._parameters);
    if (parameters != NULL) modules = PyDict_GetItemWithError(dict, state->names._modules);
    Py_XINCREF(parameters);
    Py_XINCREF(modules);
    if (PyErr_Occurred()) goto done;
    if (modules != NULL && PyDict_Check(modules) && PyDict_Size(modules) == 0 &&
        PyDict_Check(parameters)) { /* a plain module without children, such as nn.Linear */
        Py_ssize_t position = 0;
        PyObject *key, *tensor;
        rc = 0;
        while (rc == 0 && PyDict_Next(parameters, &position, &key, &tensor)) {
            if (tensor == Py_None) continue;
            Py_INCREF(tensor);
            rc = call(context, tensor);
            Py_DECREF(tensor);
        }
    } else if ((values = PyObject_CallMethod(entry, "parameters", NULL)) != NULL) {
        rc = each_of_iterable(values, call, context);
    }
done:
    Py_XDECREF(values);
    Py_XDECREF(modules);
    Py_XDECREF(parameters);
    Py_XDECREF(dict);
    return rc;
}

/* --- the ledger --- */

static int set_update_last(PyObject *set, PyObject *order, Py_ssize_t count) {
    PyObject *reversed = PyObject_CallMethod(order, "__reversed__", NULL), *key;
    if (reversed == NULL) return -1;
    int rc = 0;
    while (rc == 0 && count-- > 0 && (key = PyIter_Next(reversed)) != NULL) {
        rc = PySet_Add(set, key);
        Py_DECREF(key);
    }
    Py_DECREF(reversed);
    return rc < 0 || PyErr_Occurred() ? -1 : 0;
}

/* Adds a name, or a list of names. */
static int set_add(PyObject *set, PyObject *names) {
    if (!PyList_Check(names)) return PyUnicode_Check(names) ? PySet_Add(set, names) : 0;
    int rc = 0;
    for (Py_ssize_t i = PyList_Size(names); rc == 0 && i-- > 0;) rc = PySet_Add(set, PyList_GetItem(names, i));
    return rc;
}

/* Names that may be trainable, by the ledger, by being active, or added since: new set, or NULL with an exception. */
static PyObject *suspects(const module_state *state, PyObject *dict, const containers *all) {
    PyObject *ledger = PyDict_GetItemWithError(dict, state->names._adapter_ledger), *set = NULL;
    const int32_t *sizes = NULL;
    if (ledger == NULL && PyErr_Occurred()) return NULL;
    if (ledger != NULL && PyTuple_Check(ledger) && PyTuple_Size(ledger) == 2) {
        PyObject *bytes = PyTuple_GetItem(ledger, 1);
        if (PyBytes_Check(bytes) && PyBytes_Size(bytes) == (Py_ssize_t)((size_t)all->count * sizeof *sizes)) {
            sizes = (const int32_t *)(const void *)PyBytes_AsString(bytes);
        }
        for (int i = 0; sizes != NULL && i < all->count; i++) {
            if (all->sizes[i] < sizes[i]) sizes = NULL;
        }
    }
    if ((set = PySet_New(sizes ? PyTuple_GetItem(ledger, 0) : NULL)) == NULL) return NULL;
    for (int i = 0; i < all->count; i++) {
        const Py_ssize_t added = all->sizes[i] - (sizes ? sizes[i] : 0);
        if (added > 0 && set_update_last(set, all->items[i].order, added) < 0) {
            Py_CLEAR(set);
            break;
        }
    }
    PyObject *active = PyDict_GetItemWithError(dict, state->names._active_adapter);
    if (set != NULL && active != NULL && set_add(set, active) < 0) Py_CLEAR(set);
    if (PyErr_Occurred()) Py_CLEAR(set);
    return set;
}

/* 1 if a frozenset has exactly the names of a list or tuple without repetitions. */
static int same_names(PyObject *set, PyObject *names) {
    Py_ssize_t left = PySequence_Size(names);
    int same = left == PySet_Size(set);
    while (same > 0 && left-- > 0) {
        PyObject *name = PySequence_GetItem(names, left);
        same = name ? PySet_Contains(set, name) : -1;
        Py_XDECREF(name);
    }
    return same > 0;
}

/* Writes the ledger of the adapters in `names` (a list or tuple). */
static int ledger_write(const module_state *state, journal *log, PyObject *dict, const containers *all,
                        PyObject *names) {
    int rc = -1;
    const size_t size = (size_t)all->count * sizeof all->sizes[0];
    PyObject *set = NULL, *bytes = NULL, *ledger = log ? log->ledger : NULL;
    if (ledger != NULL) { /* written in the same call */
        PyObject *sizes = PyTuple_GetItem(ledger, 1);
        if (PyBytes_Size(sizes) != (Py_ssize_t)size || memcmp(PyBytes_AsString(sizes), all->sizes, size) != 0 ||
            !same_names(PyTuple_GetItem(ledger, 0), names)) {
            ledger = NULL;
        }
        if (PyErr_Occurred()) return -1;
        Py_XINCREF(ledger);
    }
    if (ledger == NULL) {
        set = PyFrozenSet_New(names);
        bytes = PyBytes_FromStringAndSize((const char *)all->sizes, (Py_ssize_t)size);
        if (set != NULL && bytes != NULL) ledger = PyTuple_Pack(2, set, bytes);
    }
    if (ledger != NULL) rc = dict_write(log, dict, state->names._adapter_ledger, ledger);
    if (rc == 0 && log != NULL && log->ledger != ledger) {
        Py_XDECREF(log->ledger);
        Py_INCREF(ledger);
        log->ledger = ledger;
    }
    Py_XDECREF(set);
    Py_XDECREF(bytes);
    Py_XDECREF(ledger);
    return rc;
}

/* Adds `names` (a set) to the ledger, if there is one. */
static int ledger_add(const module_state *state, journal *log, PyObject *dict, PyObject *names) {
    PyObject *ledger = PyDict_GetItemWithError(dict, state->names._adapter_ledger), *set = NULL, *changed = NULL;
    if (ledger == NULL || !PyTuple_Check(ledger) || PyTuple_Size(ledger) != 2) return PyErr_Occurred() ? -1 : 0;
    int rc = -1;
    if ((set = PyNumber_Or(PyTuple_GetItem(ledger, 0), names)) != NULL &&
        (changed = PyTuple_Pack(2, set, PyTuple_GetItem(ledger, 1))) != NULL) {
        rc = dict_write(log, dict, state->names._adapter_ledger, changed);
    }
    Py_XDECREF(set);
    Py_XDECREF(changed);
    return rc;
}

/* --- the operations --- */

/* Visits every entry of the adapters in `names` (any iterable) in all containers; `wanted` decides the flag, if given. */
static int each_entry(const containers *all, PyObject *names, PyObject *wanted, visit call, visit_context *context) {
    PyObject *iterator = PyObject_GetIter(names), *name;
    if (iterator == NULL) return -1;
    int rc = 0;
    while (rc == 0 && (name = PyIter_Next(iterator)) != NULL) {
        if (wanted != NULL) rc = context->flag = PySequence_Contains(wanted, name);
        if (rc > 0) rc = 0;
        for (int i = 0; rc == 0 && i < all->count; i++) {
            PyObject *entry = all->sizes[i] ? container_get(&all->items[i], name) : NULL;
            if (entry != NULL) rc = entry_visit(entry, call, context);
            Py_XDECREF(entry);
            if (PyErr_Occurred()) rc = -1;
        }
        Py_DECREF(name);
    }
    Py_DECREF(iterator);
    return rc < 0 || PyErr_Occurred() ? -1 : 0;
}

int grads_set_adapter(const module_state *state, journal *log, PyObject *layer, PyObject *dict, PyObject *names,
                      int frozen) {
    containers all;
    if (containers_open(state, layer, dict, &all) < 0) return -1;
    int rc = -1;
    visit_context context = {.state = state, .log = log};
    PyObject *nobody = frozen ? PyTuple_New(0) : NULL, *wanted = frozen ? nobody : names;
    PyObject *set = wanted ? suspects(state, dict, &all) : NULL;
    if (set == NULL) goto done;
    if (set_add(set, names) < 0) goto done;
    if (each_entry(&all, set, wanted, visit_set, &context) < 0) goto done;
    rc = ledger_write(state, log, dict, &all, wanted);
done:
    Py_XDECREF(set);
    Py_XDECREF(nobody);
    containers_free(&all);
    return rc;
}

int grads_set(const module_state *state, journal *log, PyObject *layer, PyObject *dict, PyObject *names, int flag) {
    containers all;
    if (containers_open(state, layer, dict, &all) < 0) return -1;
    visit_context context = {.state = state, .log = log, .flag = flag};
    int rc = flag ? ledger_add(state, log, dict, names) : 0;
    if (rc == 0) rc = each_entry(&all, names, NULL, visit_set, &context);
    containers_free(&all);
    return rc;
}

/* Freezes the entries of `names`; appends (container, adapter) of those that were trainable to `list`. */
static int freeze_and_note(const module_state *state, journal *log, const containers *all, PyObject *names,
                           PyObject *list) {
    PyObject *iterator = PyObject_GetIter(names), *name;
    if (iterator == NULL) return -1;
    int rc = 0;
    while (rc == 0 && (name = PyIter_Next(iterator)) != NULL) {
        for (int i = 0; rc == 0 && i < all->count; i++) {
            visit_context context = {.state = state, .log = log};
            PyObject *entry = all->sizes[i] ? container_get(&all->items[i], name) : NULL, *pair = NULL;
            if (entry != NULL) rc = entry_visit(entry, visit_freeze, &context);
            Py_XDECREF(entry);
            if (rc == 0 && context.trainable) {
                pair = PyTuple_Pack(2, all->items[i].name, name);
                rc = pair ? PyList_Append(list, pair) : -1;
                Py_XDECREF(pair);
            }
            if (PyErr_Occurred()) rc = -1;
        }
        Py_DECREF(name);
    }
    Py_DECREF(iterator);
    return rc < 0 || PyErr_Occurred() ? -1 : 0;
}

int grads_disable(const module_state *state, journal *log, PyObject *layer, PyObject *dict, int remember) {
    containers all;
    if (containers_open(state, layer, dict, &all) < 0) return -1;
    int rc = -1;
    PyObject *list = PyList_New(0), *memory = NULL, *nobody = PyTuple_New(0), *set = suspects(state, dict, &all);
    if (set == NULL || nobody == NULL || list == NULL) goto done;
    if (freeze_and_note(state, log, &all, set, list) < 0) goto done;
    if (remember) {
        if ((memory = PyList_AsTuple(list)) == NULL) goto done;
        if (dict_write(log, dict, state->names._disabled_trainable, memory) < 0) goto done;
    }
    rc = ledger_write(state, log, dict, &all, nobody);
done:
    Py_XDECREF(set);
    Py_XDECREF(list);
    Py_XDECREF(memory);
    Py_XDECREF(nobody);
    containers_free(&all);
    return rc;
}

int grads_restore(const module_state *state, journal *log, PyObject *layer, PyObject *dict, PyObject *memory,
                  PyObject *strict) {
    containers all;
    if (containers_open(state, layer, dict, &all) < 0) return -1;
    int rc = -1;
    visit_context context = {.state = state, .log = log, .flag = 0};
    PyObject *names = PySet_New(NULL);
    if (names == NULL) goto done;
    if (strict != NULL && each_entry(&all, strict, NULL, visit_set, &context) < 0) goto done;
    context.flag = 1;
    for (Py_ssize_t k = 0; k < PyTuple_Size(memory); k++) {
        PyObject *pair = PyTuple_GetItem(memory, k), *name = PyTuple_GetItem(pair, 1);
        if (name == NULL || PySet_Add(names, name) < 0) goto done;
        for (int i = 0; i < all.count; i++) {
            const int same = PyObject_RichCompareBool(all.items[i].name, PyTuple_GetItem(pair, 0), Py_EQ);
            PyObject *entry = same > 0 ? container_get(&all.items[i], name) : NULL;
            const int failed = entry != NULL && entry_visit(entry, visit_set, &context) < 0;
            Py_XDECREF(entry);
            if (failed || PyErr_Occurred()) goto done;
        }
    }
    if (ledger_add(state, log, dict, names) < 0) goto done;
    rc = dict_write(log, dict, state->names._disabled_trainable, NULL);
done:
    Py_XDECREF(names);
    containers_free(&all);
    return rc;
}

int grads_list(const module_state *state, PyObject *layer, PyObject *dict, PyObject *also, PyObject *skip,
               PyObject *list) {
    containers all;
    if (containers_open(state, layer, dict, &all) < 0) return -1;
    int rc = -1;
    visit_context context = {.state = state, .list = list};
    PyObject *set = suspects(state, dict, &all), *others = NULL;
    if (set != NULL && set_add(set, also) == 0) others = PyNumber_Subtract(set, skip);
    if (others != NULL) rc = each_entry(&all, others, NULL, visit_list, &context);
    Py_XDECREF(set);
    Py_XDECREF(others);
    containers_free(&all);
    return rc;
}

int grads_freeze(const module_state *state, journal *log, PyObject *layer, PyObject *dict, PyObject *declared,
                 PyObject *names) {
    containers all;
    if (containers_open(state, layer, dict, &all) < 0) return -1;
    visit_context context = {.state = state, .log = log, .flag = 0};
    PyObject *iterator = PyObject_GetIter(names), *name;
    int rc = iterator ? 0 : -1;
    while (rc == 0 && (name = PyIter_Next(iterator)) != NULL) {
        PyObject *frozen = PyDict_GetItemWithError(declared, name); /* the containers' names */
        for (int i = 0; frozen != NULL && rc == 0 && i < all.count; i++) {
            const int listed = PySequence_Contains(frozen, all.items[i].name);
            PyObject *entry = listed > 0 ? container_get(&all.items[i], name) : NULL;
            if (entry != NULL) rc = entry_visit(entry, visit_set, &context);
            Py_XDECREF(entry);
            if (PyErr_Occurred()) rc = -1;
        }
        Py_DECREF(name);
        if (PyErr_Occurred()) rc = -1;
    }
    Py_XDECREF(iterator);
    containers_free(&all);
    return rc < 0 || PyErr_Occurred() ? -1 : 0;
}
