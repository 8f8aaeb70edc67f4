/* containers.c: see containers.h. */
#include "containers.h"

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

void containers_free(containers *all) {
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

int containers_open(const module_state *state, PyObject *layer, PyObject *dict, containers *all) {
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
