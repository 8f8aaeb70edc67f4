/* containers.c: see containers.h. */
#include "containers.h"

/* dict[key] if that is a dict: new reference, else NULL (exception set only on failure). */
static PyObject *dict_item(PyObject *dict, PyObject *key) {
    PyObject *item = PyDict_GetItemWithError(dict, key);
    return item != NULL && (PyDict_CheckExact(item) || PyDict_Check(item)) ? Py_NewRef(item) : NULL;
}

void containers_free(containers *all) {
    for (int i = 0; i < all->count; i++) {
        Py_XDECREF(all->items[i].object);
        Py_XDECREF(all->items[i].order);
        Py_XDECREF(all->items[i].entries);
    }
    Py_XDECREF(all->names);
}

/* Opens a ModuleDict or ParameterDict by its dicts: 1, or 0 if `self->object` is neither, or -1 with an exception. */
static int module_open(const module_state *state, container *self) {
    PyObject *const type = (PyObject *)Py_TYPE(self->object);
    const int parameters = type == state->objects.ParameterDict;
    if (!parameters && type != state->objects.ModuleDict) return 0;
    PyObject *dict = PyObject_GenericGetDict(self->object, NULL);
    if (dict == NULL) return -1;
    self->entries = dict_item(dict, parameters ? state->names._parameters : state->names._modules);
    self->order = parameters ? dict_item(dict, state->names._keys) : Py_XNewRef(self->entries);
    Py_DECREF(dict);
    return PyErr_Occurred() ? -1 : self->entries != NULL && self->order != NULL;
}

static int container_open(const module_state *state, PyObject *layer, PyObject *children, container *self) {
    self->object = children ? PyDict_GetItemWithError(children, self->name) : NULL;
    Py_XINCREF(self->object);
    if (self->object == NULL) {
        if (PyErr_Occurred() || (self->object = PyObject_GetAttr(layer, self->name)) == NULL) return -1;
    }
    const int opened = module_open(state, self);
    if (opened != 0) return opened < 0 ? -1 : 0;
    /* any other mapping: a copy of its items */
    Py_CLEAR(self->order);
    Py_CLEAR(self->entries);
    PyObject *items = PyObject_CallMethod(self->object, "items", NULL);
    if (items != NULL && (self->entries = PyDict_New()) != NULL &&
        PyDict_MergeFromSeq2(self->entries, items, 1) == 0) {
        self->order = Py_NewRef(self->entries);
    }
    Py_XDECREF(items);
    return self->order != NULL ? 0 : -1;
}

int containers_open(const module_state *state, const class_facts *facts, PyObject *layer, PyObject *dict,
                    containers *all) {
    int rc = -1;
    PyObject *children = dict_item(dict, state->names._modules), *names;
    if (children == NULL && PyErr_Occurred()) return -1;
    all->count = 0;
    all->names = NULL;
    if ((names = layer_attribute(state, facts, layer, dict, LAYER_NAMES)) == NULL) goto done;
    all->names = PySequence_Tuple(names);
    Py_DECREF(names);
    if (all->names == NULL) goto done;
    const Py_ssize_t count = PyTuple_Size(all->names);
    if (count > CONTAINERS_MAX) {
        PyErr_Format(PyExc_ValueError, "%R has %zd adapter_layer_names; at most %d are supported", Py_TYPE(layer),
                     count, CONTAINERS_MAX);
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

PyObject *container_get(const container *self, PyObject *adapter) {
    PyObject *entry = PyDict_GetItemWithError(self->entries, adapter);
    Py_XINCREF(entry);
    if (entry != NULL || PyErr_Occurred() || self->entries == self->order) return entry;
    const int known = PyDict_Contains(self->order, adapter);
    return known > 0 ? PyObject_GetItem(self->object, adapter) : NULL;
}
