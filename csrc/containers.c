/* containers.c: see containers.h. */
#include "containers.h"

#include "prefetch.h"

/* dict[key] if that is a dict: new reference, else NULL (exception set only on failure). */
static PyObject *dict_item(PyObject *dict, PyObject *key, hint *where) {
    PyObject *item = dict_get(dict, key, where);
    if (item == NULL || !PyDict_Check(item)) return NULL;
    PREFETCH(item);
    return Py_NewRef(item);
}

int layer_open(const module_state *state, class_table *classes, PyObject *object, tuned_layer *self) {
    *self = (tuned_layer){.facts = class_of(state, classes, Py_TYPE(object)), .object = Py_NewRef(object)};
    if (self->facts != NULL) self->dict = PyObject_GenericGetDict(object, NULL);
    if (self->dict != NULL) PREFETCH(self->dict);
    return self->dict ? 0 : -1;
}

void layer_close(tuned_layer *self) {
    Py_XDECREF(self->object);
    Py_XDECREF(self->dict);
    Py_XDECREF(self->modules);
    Py_XDECREF(self->names);
    Py_XDECREF(self->ledger);
    Py_XDECREF(self->last);
}

/* Whether the layer's __dict__ has a method. */
static bool has_method(const module_state *state, const tuned_layer *self, int method) {
    const int has = PyDict_Contains(self->dict, method_name(state, method));
    if (has < 0) PyErr_Clear();
    return has > 0;
}

bool layer_has_own(const module_state *state, const tuned_layer *self, int method) {
    return self->facts->own & 1u << method || (!layer_was_plain(self) && has_method(state, self, method));
}

/* Looks through a layer's __dict__ for layer_is_plain. */
static void look_through(const module_state *state, tuned_layer *self) {
    PyObject *const names[] = {state->names.adapter_layer_names, state->names.other_param_names,
                               state->names.frozen_peft_weight_names};
    PyObject *key = NULL;
    for (int k = LAYER_NAMES; k <= FROZEN_NAMES; k++) {
        if (self->facts->attributes[k] != NULL && PyDict_Contains(self->dict, names[k]) == 0) continue;
        PyErr_Clear(); /* whoever looks it up will see */
        return;
    }
    for (int m = 0; m < METHODS; m++) {
        if (has_method(state, self, m)) return;
    }
    for (Py_ssize_t at = 0, next = 0; PyDict_Next(self->dict, &next, &key, NULL); at = next) self->last_at = at;
    self->last = Py_XNewRef(key);
}

bool layer_is_plain(const module_state *state, tuned_layer *self) {
    const Py_ssize_t size = PyDict_Size(self->dict);
    PyObject *key;
    Py_ssize_t at = self->last_at;
    if (size == self->dict_size) {
        if (self->last == NULL) return false;
        if (PyDict_Next(self->dict, &at, &key, NULL) && key == self->last && !PyDict_Next(self->dict, &at, &key, NULL))
            return true;
    }
    Py_CLEAR(self->last);
    self->dict_size = size;
    look_through(state, self);
    return self->last != NULL;
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

/* Finds the containers of one layer. */
static int find_containers(const module_state *state, tuned_layer *self, container_pool *pool) {
    int rc = -1;
    PyObject *names = layer_attribute(state, self->facts, self->object, self->dict, LAYER_NAMES);
    if (names == NULL || (self->names = PySequence_Tuple(names)) == NULL) goto done;
    self->first = pool->count;
    self->count = (size_t)PyTuple_Size(self->names);
    self->steady = self->names == names;
    if (pool_reserve(pool, self->count) < 0) goto done;
    for (size_t k = 0; k < self->count; k++) {
        PyObject *name = PyTuple_GetItem(self->names, (Py_ssize_t)k);
        PyObject *object =
            self->modules ? dict_get(self->modules, name, &self->facts->in_modules[k % CHILDREN]) : NULL;
        if (object == NULL && PyErr_Occurred()) goto done;
        if (object == NULL) self->steady = false;
        object = object ? Py_NewRef(object) : PyObject_GetAttr(self->object, name);
        if (object == NULL) goto done;
        PREFETCH(object);
        pool->items[pool->count++] = (container){.name = name, .object = object};
    }
    rc = 0;
done:
    Py_XDECREF(names);
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

/* Finds where the containers from `first` on keep their entries. */
static int find_entries(const module_state *state, container_pool *pool, size_t first) {
    for (size_t i = first; i < pool->count; i++) {
        container *const self = &pool->items[i];
        PyObject *const type = (PyObject *)Py_TYPE(self->object);
        if (type != state->objects.ModuleDict && type != state->objects.ParameterDict) continue;
        if ((self->dict = PyObject_GenericGetDict(self->object, NULL)) == NULL) return -1;
        PREFETCH(self->dict);
    }
    for (size_t i = first; i < pool->count; i++) {
        container *const self = &pool->items[i];
        if (self->dict == NULL) continue;
        const int parameters = (PyObject *)Py_TYPE(self->object) == state->objects.ParameterDict;
        self->entries = parameters ? dict_item(self->dict, state->names._parameters, &pool->hints[PARAMETERS])
                                   : dict_item(self->dict, state->names._modules, &pool->hints[MODULES]);
        self->order =
            parameters ? dict_item(self->dict, state->names._keys, &pool->hints[KEYS]) : Py_XNewRef(self->entries);
        if (PyErr_Occurred()) return -1;
    }
    for (size_t i = first; i < pool->count; i++) {
        container *const self = &pool->items[i];
        if (self->entries != NULL && self->order != NULL) continue;
        Py_CLEAR(self->entries);
        Py_CLEAR(self->order);
        self->copied = true;
        if (copy_items(self) < 0) return -1;
    }
    return 0;
}

int containers_open(const module_state *state, tuned_layer *const *layers, size_t count, container_pool *pool) {
    const size_t first = pool->count;
    for (size_t i = 0; i < count; i++) {
        tuned_layer *const self = layers[i];
        PyObject *modules = dict_get(self->dict, state->names._modules, &self->facts->hints[MODULES]);
        if (modules == NULL && PyErr_Occurred()) return -1;
        if (modules == NULL || !PyDict_Check(modules)) continue;
        self->modules = Py_NewRef(modules);
        PREFETCH(modules);
    }
    for (size_t i = 0; i < count; i++) {
        if (find_containers(state, layers[i], pool) < 0) return -1;
    }
    if (find_entries(state, pool, first) < 0) return -1;
    for (size_t i = 0; i < count; i++) {
        const container *own = pool->items + layers[i]->first;
        for (size_t k = 0; k < layers[i]->count; k++) layers[i]->steady &= !own[k].copied;
    }
    containers_measure(pool);
    return 0;
}

void layer_trace(const tuned_layer *self, const container_pool *pool, footprint *lines) {
    const hint *const hints = self->facts->hints;
    const char *const keys = keys_of(self->dict);
    trace_add(lines, keys); /* for the names that it does not have */
    trace_add(lines, keys + 64);
    const Py_ssize_t room = room_of(self->dict);
    for (int k = LEDGER; k <= MERGED; k++) trace_add(lines, item_in(self->dict, hints[k].at, room));
    for (int k = 0; k < 2; k++) { /* the lists of active and of merged adapters */
        Py_ssize_t place = hints[k ? MERGED : ACTIVE].at;
        PyObject *list;
        if (!PyDict_Next(self->dict, &place, NULL, &list) || !PyList_Check(list)) continue;
        trace_add(lines, list);
        if (PyList_Size(list)) trace_add(lines, word_of(list, 3));
    }
    for (size_t k = 0; k < self->count; k++) {
        PyObject *const order = pool->items[self->first + k].order;
        trace_add(lines, order);
        if (PyDict_Size(order) == 0) continue;
        trace_add(lines, keys_of(order));
        trace_add(lines, item_of(order, 0));
    }
}

int containers_measure(container_pool *pool) {
    bool changed = false;
    for (size_t i = 0; i < pool->count; i++) {
        const int32_t size = (int32_t)PyDict_Size(pool->items[i].order);
        changed |= size != pool->items[i].size;
        pool->items[i].size = size;
    }
    pool->measured += changed;
    return changed;
}

PyObject *container_get(const container *self, PyObject *adapter, hint *where) {
    PyObject *entry = dict_get(self->entries, adapter, where);
    Py_XINCREF(entry);
    if (entry != NULL || PyErr_Occurred() || self->entries == self->order) return entry;
    const int known = PyDict_Contains(self->order, adapter);
    return known > 0 ? PyObject_GetItem(self->object, adapter) : NULL;
}
