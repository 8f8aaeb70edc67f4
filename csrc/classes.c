/* classes.c: see classes.h. */
#include "classes.h"

enum { LONGEST_SEARCH = 1 << 14, MOST_SEARCHES = 4 };

PyObject *dict_search(PyObject *dict, PyObject *key, hint *where) {
    PyObject *value = PyDict_GetItemWithError(dict, key), *found;
    if (value == NULL || where->searched >= MOST_SEARCHES) return value;
    where->searched++;
    Py_ssize_t next = 0;
    for (Py_ssize_t at = 0, n = 0; n < LONGEST_SEARCH && PyDict_Next(dict, &next, &found, NULL); at = next, n++) {
        if (found != key) continue;
        where->at = at;
        break;
    }
    return value;
}

/* 1 if type.name is base.name, 0 if not, -1 with an exception. */
static int shares(PyTypeObject *type, PyObject *base, PyObject *name) {
    PyObject *own = PyObject_GetAttr((PyObject *)type, name), *other = own ? PyObject_GetAttr(base, name) : NULL;
    const int result = other == NULL ? -1 : own == other;
    Py_XDECREF(own);
    Py_XDECREF(other);
    return result;
}

PyObject *method_name(const module_state *state, int method) {
    PyObject *const names[] = {state->names.set_adapter, state->names.enable_adapters, state->names.set_requires_grad,
                               state->names._freeze_non_trainable_peft_weights};
    return names[method];
}

static PyObject *attribute_name(const module_state *state, int attribute) {
    PyObject *const names[] = {state->names.adapter_layer_names, state->names.other_param_names,
                               state->names.frozen_peft_weight_names, state->names.merged_adapters};
    return names[attribute];
}

static int ask_containers(class_facts *facts) {
    PyObject *const own = facts->attributes[LAYER_NAMES], *const others = facts->attributes[PARAM_NAMES];
    if (own == NULL || others == NULL) return 0;
    PyObject *set = PySet_New(own), *all = set ? PyObject_CallMethod(set, "union", "(O)", others) : NULL;
    if (all != NULL) facts->containers = PyFrozenSet_New(all);
    Py_XDECREF(set);
    Py_XDECREF(all);
    return facts->containers ? 0 : -1;
}

static int ask_layer(const module_state *state, class_facts *facts) {
    for (int m = 0; m < METHODS; m++) {
        const int same = shares(facts->type, state->types.LayerBase, method_name(state, m));
        if (same < 0) return -1;
        if (!same) facts->own |= 1u << m;
    }
    for (int k = 0; k < ATTRIBUTES; k++) {
        PyObject *value = PyObject_GetAttr((PyObject *)facts->type, attribute_name(state, k));
        if (value == NULL) { /* an attribute of its objects only */
            if (!PyErr_ExceptionMatches(PyExc_AttributeError)) return -1;
            PyErr_Clear();
        } else if (PyTuple_CheckExact(value) || PyList_CheckExact(value) || PyDict_CheckExact(value)) {
            facts->attributes[k] = value;
        } else { /* it may be a property */
            Py_DECREF(value);
        }
    }
    return ask_containers(facts);
}

static void forget(class_facts *facts) {
    for (int k = 0; k < ATTRIBUTES; k++) Py_XDECREF(facts->attributes[k]);
    for (int k = 0; k < CHILDREN; k++) Py_XDECREF(facts->children[k]);
    Py_XDECREF(facts->containers);
    Py_XDECREF(facts->type);
    PyMem_Free(facts);
}

static class_facts *ask(const module_state *state, PyTypeObject *type) {
    class_facts *facts = PyMem_Calloc(1, sizeof *facts);
    if (facts == NULL) return (class_facts *)PyErr_NoMemory();
    Py_INCREF(type);
    facts->type = type;
    facts->layer = PyType_IsSubtype(type, (PyTypeObject *)state->types.LayerBase);
    if (facts->layer) {
        facts->plain = 1;
        if (ask_layer(state, facts) < 0) goto failed;
        return facts;
    }
    facts->own = ~0u;
    if ((facts->plain = shares(type, state->objects.Module, state->names.named_modules)) < 0) {
        if (!PyErr_ExceptionMatches(PyExc_AttributeError)) goto failed;
        PyErr_Clear();
        facts->plain = 0;
    }
    return facts;
failed:
    forget(facts);
    return NULL;
}

class_facts *class_of(const module_state *state, class_table *table, PyTypeObject *type) {
    for (size_t i = 0; i < table->count; i++) {
        if (table->items[i]->type == type) return table->items[i];
    }
    if (table->count == table->capacity) {
        const size_t capacity = 2 * table->capacity + 8;
        class_facts **items = PyMem_Realloc(table->items, capacity * sizeof *items);
        if (items == NULL) return (class_facts *)PyErr_NoMemory();
        table->items = items;
        table->capacity = capacity;
    }
    class_facts *facts = ask(state, type);
    if (facts != NULL) table->items[table->count++] = facts;
    return facts;
}

int classes_same(const module_state *state, const class_table *table) {
    int same = 1;
    for (size_t i = 0; same && i < table->count; i++) {
        const class_facts *old = table->items[i];
        class_facts *now = ask(state, old->type);
        if (now == NULL) return -1;
        same = now->own == old->own && now->plain == old->plain;
        for (int k = 0; k < ATTRIBUTES; k++) same = same && now->attributes[k] == old->attributes[k];
        forget(now);
    }
    return same;
}

void class_table_free(class_table *table) {
    for (size_t i = 0; i < table->count; i++) forget(table->items[i]);
    PyMem_Free(table->items);
}

PyObject *layer_attribute(const module_state *state, class_facts *facts, PyObject *layer, PyObject *dict,
                          int attribute) {
    PyObject *name = attribute_name(state, attribute), *value = facts->attributes[attribute];
    if (value == NULL) return PyObject_GetAttr(layer, name);
    PyObject *own = attribute == MERGED_NAMES ? dict_get(dict, name, &facts->hints[MERGED]) /* layers have their own */
                                              : PyDict_GetItemWithError(dict, name);
    if (own == NULL && PyErr_Occurred()) return NULL;
    return Py_NewRef(own ? own : value);
}
