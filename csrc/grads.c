/* grads.c: see grads.h. */
#include "grads.h"

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
    int trainable;  /* visit_test: becomes 1 when a tensor is trainable */
} visit_context;

typedef int (*visit)(visit_context *context, PyObject *tensor);

static int visit_set(visit_context *context, PyObject *tensor) {
    return tensor_set(context->state, context->log, tensor, context->flag);
}

static int visit_test(visit_context *context, PyObject *tensor) {
    const int flag = context->trainable ? 0 : flag_of(context->state, tensor);
    if (flag > 0) context->trainable = 1;
    return flag < 0 ? -1 : 0;
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

/* The item `key` of object.__dict__ when it is a dict: new reference, else NULL (exception set only on failure). */
static PyObject *own_dict(PyObject *object, PyObject *key) {
    PyObject *dict = PyObject_GenericGetDict(object, NULL);
    if (dict == NULL) {
        if (PyErr_ExceptionMatches(PyExc_AttributeError)) PyErr_Clear();
        return NULL;
    }
    PyObject *item = PyDict_GetItemWithError(dict, key);
    if (item != NULL && !PyDict_Check(item)) item = NULL;
    Py_XINCREF(item);
    Py_DECREF(dict);
    return item;
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
    PyObject *parameters = own_dict(entry, state->names._parameters), *modules = NULL, *values = NULL;
    if (parameters != NULL) modules = own_dict(entry, state->names._modules);
    if (PyErr_Occurred()) goto done;
    if (modules != NULL && PyDict_Size(modules) == 0) { /* a plain module without children, such as nn.Linear */
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
    return rc;
}

/* --- containers --- */

typedef struct {
    PyObject *name;    /* borrowed: the attribute's name */
    PyObject *object;  /* owned: the container */
    PyObject *order;   /* owned: a dict whose keys are the adapter names, oldest first */
    PyObject *entries; /* owned: a dict with the entries (a ParameterDict may keep some elsewhere) */
} container;

enum { CONTAINERS_MAX = 24 };

typedef struct {
    PyObject *names; /* owned: the tuple adapter_layer_names */
    int count;
    int32_t sizes[CONTAINERS_MAX];
    container items[CONTAINERS_MAX];
} containers;

static void containers_free(containers *all) {
    for (int i = 0; i < all->count; i++) {
        Py_XDECREF(all->items[i].object);
        Py_XDECREF(all->items[i].order);
        Py_XDECREF(all->items[i].entries);
    }
    Py_XDECREF(all->names);
}

static int container_open(const module_state *state, PyObject *layer, PyObject *children, container *self) {
    self->object = children ? PyDict_GetItemWithError(children, self->name) : NULL;
    Py_XINCREF(self->object);
    if (self->object == NULL) {
        if (PyErr_Occurred() || (self->object = PyObject_GetAttr(layer, self->name)) == NULL) return -1;
    }
    PyObject *type = (PyObject *)Py_TYPE(self->object);
    if (type == state->objects.ModuleDict) {
        self->entries = own_dict(self->object, state->names._modules);
        self->order = self->entries;
        Py_XINCREF(self->order);
    } else if (type == state->objects.ParameterDict) {
        self->entries = own_dict(self->object, state->names._parameters);
        self->order = own_dict(self->object, state->names._keys);
    }
    if (PyErr_Occurred()) return -1;
    if (self->entries != NULL && self->order != NULL) return 0;
    /* any other mapping: a copy of its items */
    Py_CLEAR(self->order);
    Py_CLEAR(self->entries);
    PyObject *items = PyObject_CallMethod(self->object, "items", NULL);
    if (items != NULL && (self->entries = PyDict_New()) != NULL &&
        PyDict_MergeFromSeq2(self->entries, items, 1) == 0) {
        self->order = self->entries;
        Py_INCREF(self->order);
    }
    Py_XDECREF(items);
    return self->order != NULL ? 0 : -1;
}

static int containers_open(const module_state *state, PyObject *layer, PyObject *dict, containers *all) {
    int rc = -1;
    PyObject *children = PyDict_GetItemWithError(dict, state->names._modules), *names;
    if (children == NULL && PyErr_Occurred()) return -1;
    if (children != NULL && !PyDict_Check(children)) children = NULL;
    Py_XINCREF(children);
    all->count = 0;
    all->names = NULL;
    if ((names = PyObject_GetAttr(layer, state->names.adapter_layer_names)) == NULL) goto done;
    all->names = PySequence_Tuple(names);
    Py_DECREF(names);
    if (all->names == NULL) goto done;
    const Py_ssize_t count = PyTuple_Size(all->names);
    if (count > CONTAINERS_MAX) {
        PyErr_Format(PyExc_ValueError, "%R has %zd adapter_layer_names; at most %d are supported", Py_TYPE(layer), count,
                     CONTAINERS_MAX);
        goto done;
    }
    while (all->count < (int)count) {
        container *self = &all->items[all->count];
        *self = (container){PyTuple_GetItem(all->names, all->count), NULL, NULL, NULL};
        all->count++;
        if (container_open(state, layer, children, self) < 0) goto done;
        all->sizes[all->count - 1] = (int32_t)PyDict_Size(self->order);
    }
    rc = 0;
done:
    Py_XDECREF(children);
    if (rc < 0) containers_free(all);
    return rc;
}

/* The entry of `adapter`: new reference, or NULL (exception set only on failure). */
static PyObject *container_get(const container *self, PyObject *adapter) {
    PyObject *entry = PyDict_GetItemWithError(self->entries, adapter);
    Py_XINCREF(entry);
    if (entry != NULL || PyErr_Occurred() || self->entries == self->order) return entry;
    const int known = PyDict_Contains(self->order, adapter);
    return known > 0 ? PyObject_GetItem(self->object, adapter) : NULL;
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

/* Writes the ledger: of `names` (any iterable) those that some container has. */
static int ledger_write(const module_state *state, journal *log, PyObject *dict, const containers *all, PyObject *names) {
    int rc = -1;
    PyObject *set = PyFrozenSet_New(names), *ledger = NULL;
    PyObject *bytes = PyBytes_FromStringAndSize((const char *)all->sizes,
                                                (Py_ssize_t)((size_t)all->count * sizeof all->sizes[0]));
    if (set != NULL && bytes != NULL && (ledger = PyTuple_Pack(2, set, bytes)) != NULL) {
        rc = dict_write(log, dict, state->names._adapter_ledger, ledger);
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

/* Appends (container, adapter) for the trainable entries of `names` to `list`. */
static int trainable_pairs(const module_state *state, const containers *all, PyObject *names, PyObject *list) {
    PyObject *iterator = PyObject_GetIter(names), *name;
    if (iterator == NULL) return -1;
    int rc = 0;
    while (rc == 0 && (name = PyIter_Next(iterator)) != NULL) {
        for (int i = 0; rc == 0 && i < all->count; i++) {
            visit_context context = {.state = state};
            PyObject *entry = all->sizes[i] ? container_get(&all->items[i], name) : NULL, *pair = NULL;
            if (entry != NULL) rc = entry_visit(entry, visit_test, &context);
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
    visit_context context = {.state = state, .log = log, .flag = 0};
    PyObject *list = NULL, *memory = NULL, *nobody = PyTuple_New(0), *set = suspects(state, dict, &all);
    if (set == NULL || nobody == NULL) goto done;
    if (remember) {
        if ((list = PyList_New(0)) == NULL || trainable_pairs(state, &all, set, list) < 0) goto done;
        if ((memory = PyList_AsTuple(list)) == NULL) goto done;
        if (dict_write(log, dict, state->names._disabled_trainable, memory) < 0) goto done;
    }
    if (each_entry(&all, set, NULL, visit_set, &context) < 0) goto done;
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
