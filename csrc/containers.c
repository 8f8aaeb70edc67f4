/* containers.c: see containers.h. */
#include "containers.h"

#include "work.h"

/* dict[key] if that is a dict: new reference, else NULL (exception set only on failure). */
static PyObject *dict_item(PyObject *dict, PyObject *key) {
    PyObject *item = PyDict_GetItemWithError(dict, key);
    if (item == NULL || !(PyDict_CheckExact(item) || PyDict_Check(item))) return NULL;
    PREFETCH(item);
    return Py_NewRef(item);
}

void containers_free(container_pool *pool) {
    for (size_t i = 0; i < pool->count; i++) {
        Py_XDECREF(pool->items[i].object);
        Py_XDECREF(pool->items[i].dict);
        Py_XDECREF(pool->items[i].order);
        Py_XDECREF(pool->items[i].entries);
    }
    PyMem_Free(pool->items);
}

static int pool_reserve(container_pool *pool, size_t more) {
    if (pool->count + more <= pool->capacity) return 0;
    const size_t capacity = 2 * pool->capacity + more;
    container *items = PyMem_Realloc(pool->items, capacity * sizeof *items);
    if (items == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    pool->items = items;
    pool->capacity = capacity;
    return 0;
}

int containers_find(const module_state *state, const class_facts *facts, PyObject *layer, PyObject *dict,
                    container_pool *pool, containers *found) {
    int rc = -1;
    PyObject *children = dict_item(dict, state->names._modules), *names = NULL;
    *found = (containers){NULL, pool->count, 0};
    if (children == NULL && PyErr_Occurred()) return -1;
    if ((names = layer_attribute(state, facts, layer, dict, LAYER_NAMES)) == NULL) goto done;
    if ((found->names = PySequence_Tuple(names)) == NULL) goto done;
    found->count = (size_t)PyTuple_Size(found->names);
    if (pool_reserve(pool, found->count) < 0) goto done;
    for (size_t k = 0; k < found->count; k++) {
        PyObject *name = PyTuple_GetItem(found->names, (Py_ssize_t)k);
        PyObject *object = children ? PyDict_GetItemWithError(children, name) : NULL;
        if (object == NULL && PyErr_Occurred()) goto done;
        object = object ? Py_NewRef(object) : PyObject_GetAttr(layer, name);
        if (object == NULL) goto done;
        PREFETCH(object);
        pool->items[pool->count++] = (container){.name = name, .object = object};
    }
    rc = 0;
done:
    Py_XDECREF(children);
    Py_XDECREF(names);
    if (rc < 0) Py_CLEAR(found->names);
    return rc;
}

/* A mapping of another class: a copy of its items. */
static int copy_items(container *self) {
    PyObject *items = PyObject_CallMethod(self->object, "items", NULL);
    if (items != NULL && (self->entries = PyDict_New()) != NULL &&
        PyDict_MergeFromSeq2(self->entries, items, 1) == 0) {
        self->order = Py_NewRef(self->entries);
    }
    Py_XDECREF(items);
    return self->order != NULL ? 0 : -1;
}

int containers_open(const module_state *state, container_pool *pool) {
    for (size_t i = 0; i < pool->count; i++) {
        container *const self = &pool->items[i];
        PyObject *const type = (PyObject *)Py_TYPE(self->object);
        if (type != state->objects.ModuleDict && type != state->objects.ParameterDict) continue;
        if ((self->dict = PyObject_GenericGetDict(self->object, NULL)) == NULL) return -1;
        PREFETCH(self->dict);
    }
    for (size_t i = 0; i < pool->count; i++) {
        container *const self = &pool->items[i];
        if (self->dict == NULL) continue;
        const int parameters = (PyObject *)Py_TYPE(self->object) == state->objects.ParameterDict;
        self->entries = dict_item(self->dict, parameters ? state->names._parameters : state->names._modules);
        self->order = parameters ? dict_item(self->dict, state->names._keys) : Py_XNewRef(self->entries);
        if (PyErr_Occurred()) return -1;
    }
    for (size_t i = 0; i < pool->count; i++) {
        container *const self = &pool->items[i];
        if (self->entries == NULL || self->order == NULL) {
            Py_CLEAR(self->entries);
            Py_CLEAR(self->order);
            if (copy_items(self) < 0) return -1;
        }
        self->size = (int32_t)PyDict_Size(self->order);
    }
    return 0;
}

PyObject *container_get(const container *self, PyObject *adapter) {
    PyObject *entry = PyDict_GetItemWithError(self->entries, adapter);
    Py_XINCREF(entry);
    if (entry != NULL || PyErr_Occurred() || self->entries == self->order) return entry;
    const int known = PyDict_Contains(self->order, adapter);
    return known > 0 ? PyObject_GetItem(self->object, adapter) : NULL;
}
