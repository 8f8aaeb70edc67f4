/* classes.c: see classes.h. */
#include "classes.h"

/* 1 if type.name is base.name, 0 if not, -1 with an exception. */
static int shares(PyTypeObject *type, PyObject *base, PyObject *name) {
    PyObject *own = PyObject_GetAttr((PyObject *)type, name), *other = own ? PyObject_GetAttr(base, name) : NULL;
    const int result = other == NULL ? -1 : own == other;
    Py_XDECREF(own);
    Py_XDECREF(other);
    return result;
}

static PyObject *attribute_name(const module_state *state, int attribute) {
    PyObject *const names[] = {state->names.adapter_layer_names, state->names.other_param_names,
                               state->names.frozen_peft_weight_names};
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
    PyObject *const methods[] = {state->names.set_adapter, state->names.enable_adapters,
                                 state->names.set_requires_grad, state->names._freeze_non_trainable_peft_weights};
    for (int m = 0; m < METHODS; m++) {
        const int same = shares(facts->type, state->types.LayerBase, methods[m]);
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
    Py_XDECREF(facts->containers);
    Py_XDECREF(facts->type);
}

const class_facts *class_of(const module_state *state, class_table *table, PyTypeObject *type) {
    const unsigned known = table->count < CLASSES ? table->count : CLASSES;
    for (unsigned i = 0; i < known; i++) {
        if (table->facts[i].type == type) return &table->facts[i];
    }
    class_facts facts = {.layer = PyType_IsSubtype(type, (PyTypeObject *)state->types.LayerBase)};
    Py_INCREF(type);
    facts.type = type;
    if (facts.layer) {
        facts.plain = 1;
        if (ask_layer(state, &facts) < 0) goto failed;
    } else {
        facts.own = ~0u;
        if ((facts.plain = shares(type, state->objects.Module, state->names.named_modules)) < 0) {
            if (!PyErr_ExceptionMatches(PyExc_AttributeError)) goto failed;
            PyErr_Clear();
            facts.plain = 0;
        }
    }
    class_facts *slot = &table->facts[table->count++ % CLASSES];
    if (table->count > CLASSES) forget(slot);
    *slot = facts;
    return slot;
failed:
    forget(&facts);
    return NULL;
}

void class_table_free(class_table *table) {
    for (unsigned i = 0; i < CLASSES && i < table->count; i++) forget(&table->facts[i]);
}

PyObject *layer_attribute(const module_state *state, const class_facts *facts, PyObject *layer, PyObject *dict,
                          int attribute) {
    PyObject *name = attribute_name(state, attribute), *value = facts->attributes[attribute];
    if (value == NULL) return PyObject_GetAttr(layer, name);
    PyObject *own = PyDict_GetItemWithError(dict, name);
    if (own == NULL && PyErr_Occurred()) return NULL;
    return Py_NewRef(own ? own : value);
}
