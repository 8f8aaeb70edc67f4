/* grads.c: see grads.h. */
#include "grads.h"

#include "flags.h"

#include <string.h>

/* Puts a new reference to `value` in the place of an owned one. */
static void replace(PyObject **place, PyObject *value) {
    PyObject *old = *place;
    Py_XINCREF(value);
    *place = value;
    Py_XDECREF(old);
}

int switch_names(switch_call *call, PyObject *names) {
    PyObject *tuple = PyUnicode_Check(names) ? PyTuple_Pack(1, names) : PySequence_Tuple(names);
    if (tuple == NULL) return -1;
    const int same = call->names ? PyObject_RichCompareBool(call->names, tuple, Py_EQ) : 0;
    if (same == 0) { /* what was found out holds for the names before */
        replace(&call->ledger, NULL);
        replace(&call->written, NULL);
        replace(&call->names, tuple);
    }
    Py_DECREF(tuple);
    return same < 0 ? -1 : 0;
}

int switch_end(switch_call *call, int rc) {
    if (rc < 0) journal_undo(call->state, &call->log);
    journal_free(&call->log);
    class_table_free(&call->classes);
    Py_XDECREF(call->names);
    Py_XDECREF(call->ledger);
    Py_XDECREF(call->suspects);
    Py_XDECREF(call->written);
    Py_XDECREF(call->paused.names);
    Py_XDECREF(call->paused.containers);
    Py_XDECREF(call->paused.trainable);
    Py_XDECREF(call->paused.pairs);
    return rc;
}

/* --- the ledger --- */

static PyObject *ledger_of(const module_state *state, PyObject *dict) {
    PyObject *ledger = PyDict_GetItemWithError(dict, state->names._adapter_ledger);
    return ledger != NULL && PyTuple_Check(ledger) && PyTuple_Size(ledger) == 2 ? ledger : NULL;
}

/* Numbers of entries that a ledger (may be NULL) was written for; NULL if it is not for these containers. */
static const int32_t *ledger_sizes(PyObject *ledger, const containers *all) {
    PyObject *bytes = ledger ? PyTuple_GetItem(ledger, 1) : NULL;
    if (bytes == NULL || !PyBytes_Check(bytes)) return NULL;
    const int32_t *sizes = (const int32_t *)(const void *)PyBytes_AsString(bytes);
    if (PyBytes_Size(bytes) != (Py_ssize_t)((size_t)all->count * sizeof *sizes)) return NULL;
    for (int k = 0; k < all->count; k++) {
        if (all->sizes[k] < sizes[k]) return NULL;
    }
    return sizes;
}

/* Whether nothing was added to the containers since the ledger was written. */
static int is_current(PyObject *ledger, const containers *all) {
    const int32_t *sizes = ledger_sizes(ledger, all);
    return sizes != NULL && memcmp(sizes, all->sizes, (size_t)all->count * sizeof *sizes) == 0;
}

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

/* Whether call->suspects and call->names have all active adapters (a name or a list). */
static int covers(const switch_call *call, PyObject *active) {
    const int single = active != NULL && PyUnicode_Check(active);
    int found = 1;
    if (active == NULL || (!single && !PyList_Check(active))) return 1;
    for (Py_ssize_t i = single ? 1 : PyList_Size(active); found == 1 && i-- > 0;) {
        PyObject *const name = single ? active : PyList_GetItem(active, i);
        found = call->names ? PySequence_Contains(call->names, name) : 0;
        if (found == 0) found = PySequence_Contains(call->suspects, name);
    }
    return found;
}

/* Collects what `suspects` returns. */
static PyObject *suspects_collect(switch_call *call, PyObject *ledger, PyObject *active, const containers *all) {
    const int32_t *sizes = ledger_sizes(ledger, all);
    PyObject *set = PySet_New(sizes ? PyTuple_GetItem(ledger, 0) : NULL), *result = NULL;
    if (set == NULL) return NULL;
    for (int k = 0; k < all->count; k++) {
        const Py_ssize_t added = all->sizes[k] - (sizes ? sizes[k] : 0);
        if (added > 0 && set_update_last(set, all->items[k].order, added) < 0) goto done;
    }
    if (active != NULL && set_add(set, active) < 0) goto done;
    for (Py_ssize_t i = call->names ? PyTuple_Size(call->names) : 0; i-- > 0;) {
        if (PySet_Discard(set, PyTuple_GetItem(call->names, i)) < 0) goto done;
    }
    result = PySequence_Tuple(set);
done:
    Py_DECREF(set);
    return result;
}

/* The names that may be trainable, by the ledger, by being active, or added since, and are not in call->names: a tuple
 * that belongs to the call, or NULL with an exception. */
static PyObject *suspects(switch_call *call, PyObject *dict, const containers *all) {
    PyObject *ledger = ledger_of(call->state, dict);
    PyObject *active = PyErr_Occurred() ? NULL : PyDict_GetItemWithError(dict, call->state->names._active_adapter);
    if (PyErr_Occurred()) return NULL;
    const int current = is_current(ledger, all);
    const int known = current && ledger == call->ledger ? covers(call, active) : 0;
    if (known != 0) return known < 0 ? NULL : call->suspects;
    PyObject *names = suspects_collect(call, ledger, active, all);
    if (names == NULL) return NULL;
    replace(&call->ledger, current ? ledger : NULL);
    replace(&call->suspects, names);
    Py_DECREF(names);
    return call->suspects;
}

/* 1 if a set has exactly the names of a tuple. */
static int same_names(PyObject *set, PyObject *names) {
    Py_ssize_t left = PyTuple_Size(names);
    int same = left == PySet_Size(set);
    while (same > 0 && left-- > 0) same = PySet_Contains(set, PyTuple_GetItem(names, left));
    return same;
}

/* Writes the ledger of the adapters in `names` (a tuple), the same in all of one call. */
static int ledger_write(switch_call *call, PyObject *dict, const containers *all, PyObject *names) {
    if (!is_current(call->written, all)) {
        PyObject *known = ledger_of(call->state, dict), *set = NULL, *bytes = NULL, *ledger = NULL;
        if (known != NULL && is_current(known, all) && same_names(PyTuple_GetItem(known, 0), names) > 0) {
            ledger = Py_NewRef(known);
        } else if (!PyErr_Occurred()) {
            set = PyFrozenSet_New(names);
            bytes = PyBytes_FromStringAndSize((const char *)all->sizes,
                                              (Py_ssize_t)((size_t)all->count * sizeof all->sizes[0]));
            if (set != NULL && bytes != NULL) ledger = PyTuple_Pack(2, set, bytes);
        }
        Py_XDECREF(set);
        Py_XDECREF(bytes);
        if (ledger == NULL) return -1;
        replace(&call->written, ledger);
        Py_DECREF(ledger);
    }
    return dict_write(&call->log, dict, call->state->names._adapter_ledger, call->written);
}

/* Adds a name to a ledger: a new one, or a new reference to the old one if it has the name. */
static PyObject *ledger_with(PyObject *ledger, PyObject *name) {
    const int known = PySet_Contains(PyTuple_GetItem(ledger, 0), name);
    if (known != 0) return known < 0 ? NULL : Py_NewRef(ledger);
    PyObject *one = PySet_New(NULL), *set = NULL, *result = NULL;
    if (one != NULL && PySet_Add(one, name) == 0 && (set = PyNumber_Or(PyTuple_GetItem(ledger, 0), one)) != NULL) {
        result = PyTuple_Pack(2, set, PyTuple_GetItem(ledger, 1));
    }
    Py_XDECREF(one);
    Py_XDECREF(set);
    return result;
}

/* Adds call->names to the ledger, if there is one. */
static int ledger_add(switch_call *call, PyObject *dict) {
    PyObject *ledger = ledger_of(call->state, dict);
    if (ledger == NULL) return PyErr_Occurred() ? -1 : 0;
    if (ledger != call->ledger) {
        PyObject *result = Py_NewRef(ledger);
        for (Py_ssize_t i = 0; result != NULL && i < PyTuple_Size(call->names); i++) {
            PyObject *more = ledger_with(result, PyTuple_GetItem(call->names, i));
            Py_DECREF(result);
            result = more;
        }
        if (result == NULL) return -1;
        replace(&call->ledger, ledger);
        replace(&call->written, result);
        Py_DECREF(result);
    }
    return dict_write(&call->log, dict, call->state->names._adapter_ledger, call->written);
}

/* --- the operations --- */

int grads_set_adapter(switch_call *call, const class_facts *facts, PyObject *layer, PyObject *dict, int frozen) {
    containers all;
    if (containers_open(call->state, facts, layer, dict, &all) < 0) return -1;
    int rc = -1;
    const visitor off = {call->state, &call->log, OFF, NULL}, on = {call->state, &call->log, frozen ? OFF : ON, NULL};
    PyObject *others = suspects(call, dict, &all), *nobody = frozen ? PyTuple_New(0) : NULL;
    if (others == NULL || (frozen && nobody == NULL)) goto done;
    if (names_visit(&off, &all, others, NULL) < 0 || names_visit(&on, &all, call->names, NULL) < 0) goto done;
    rc = ledger_write(call, dict, &all, frozen ? nobody : call->names);
done:
    Py_XDECREF(nobody);
    containers_free(&all);
    return rc;
}

int grads_set(switch_call *call, const class_facts *facts, PyObject *layer, PyObject *dict, int flag) {
    containers all;
    if (containers_open(call->state, facts, layer, dict, &all) < 0) return -1;
    const visitor turn = {call->state, &call->log, flag ? ON : OFF, NULL};
    int rc = flag ? ledger_add(call, dict) : 0;
    if (rc == 0) rc = names_visit(&turn, &all, call->names, NULL);
    containers_free(&all);
    return rc;
}

/* The pairs (container, adapter) of which `trainable` has a 1: new tuple. Layers that are alike share it. */
static PyObject *paused_pairs(switch_call *call, const containers *all, PyObject *names, PyObject *trainable) {
    if (call->paused.names == names && call->paused.containers == all->names) {
        const int same = PyObject_RichCompareBool(call->paused.trainable, trainable, Py_EQ);
        if (same != 0) return same < 0 ? NULL : Py_NewRef(call->paused.pairs);
    }
    const char *flags = PyBytes_AsString(trainable);
    PyObject *list = PyList_New(0), *pairs = NULL;
    for (Py_ssize_t i = 0, count = PyBytes_Size(trainable); list != NULL && i < count; i++) {
        if (!flags[i]) continue;
        PyObject *pair = PyTuple_Pack(2, all->items[i % all->count].name, PyTuple_GetItem(names, i / all->count));
        if (pair == NULL || PyList_Append(list, pair) < 0) Py_CLEAR(list);
        Py_XDECREF(pair);
    }
    if (list != NULL) pairs = PyList_AsTuple(list);
    Py_XDECREF(list);
    if (pairs != NULL) {
        replace(&call->paused.names, names);
        replace(&call->paused.containers, all->names);
        replace(&call->paused.trainable, trainable);
        replace(&call->paused.pairs, pairs);
    }
    return pairs;
}

int grads_disable(switch_call *call, const class_facts *facts, PyObject *layer, PyObject *dict, int remember) {
    containers all;
    if (containers_open(call->state, facts, layer, dict, &all) < 0) return -1;
    int rc = -1;
    const visitor off = {call->state, &call->log, OFF, NULL};
    PyObject *names = suspects(call, dict, &all), *trainable = NULL, *pairs = NULL;
    if (names == NULL) goto done;
    if ((trainable = PyBytes_FromStringAndSize(NULL, PyTuple_Size(names) * all.count)) == NULL) goto done;
    if (names_visit(&off, &all, names, PyBytes_AsString(trainable)) < 0) goto done;
    rc = 0;
    if (remember) {
        pairs = paused_pairs(call, &all, names, trainable);
        rc = pairs ? dict_write(&call->log, dict, call->state->names._disabled_trainable, pairs) : -1;
    }
done:
    Py_XDECREF(trainable);
    Py_XDECREF(pairs);
    containers_free(&all);
    return rc;
}

/* Makes the entries trainable that a pair (container, adapter) names, and notes it in the ledger. */
static int restore_pair(switch_call *call, PyObject *dict, const containers *all, PyObject *pair) {
    const visitor on = {call->state, &call->log, ON, NULL};
    PyObject *const list = PyTuple_GetItem(pair, 0), *const name = PyTuple_GetItem(pair, 1);
    PyObject *ledger = name ? ledger_of(call->state, dict) : NULL, *more = ledger ? ledger_with(ledger, name) : NULL;
    int rc = more ? dict_write(&call->log, dict, call->state->names._adapter_ledger, more) : 0;
    Py_XDECREF(more);
    for (int k = 0; rc >= 0 && !PyErr_Occurred() && k < all->count; k++) {
        if (all->items[k].name != list && PyUnicode_Compare(all->items[k].name, list) != 0) continue;
        PyObject *entry = container_get(&all->items[k], name);
        if (entry != NULL) rc = entry_visit(&on, entry);
        Py_XDECREF(entry);
    }
    return rc < 0 || PyErr_Occurred() ? -1 : 0;
}

int grads_restore(switch_call *call, const class_facts *facts, PyObject *layer, PyObject *dict, PyObject *memory,
                  PyObject *strict) {
    containers all;
    if (containers_open(call->state, facts, layer, dict, &all) < 0) return -1;
    const visitor off = {call->state, &call->log, OFF, NULL};
    PyObject *active = strict ? PySequence_Tuple(strict) : NULL;
    int rc = strict != NULL ? (active ? names_visit(&off, &all, active, NULL) : -1) : 0;
    for (Py_ssize_t i = 0; rc == 0 && i < PyTuple_Size(memory); i++) {
        rc = restore_pair(call, dict, &all, PyTuple_GetItem(memory, i));
    }
    if (rc == 0) rc = dict_write(&call->log, dict, call->state->names._disabled_trainable, NULL);
    Py_XDECREF(active);
    containers_free(&all);
    return rc;
}

int grads_list(switch_call *call, const class_facts *facts, PyObject *layer, PyObject *dict, PyObject *skip,
               PyObject *list) {
    containers all;
    if (containers_open(call->state, facts, layer, dict, &all) < 0) return -1;
    int rc = -1;
    const visitor look = {call->state, &call->log, LIST, list};
    PyObject *names = suspects(call, dict, &all), *set = names ? PySet_New(call->names) : NULL, *tuple = NULL;
    for (Py_ssize_t i = set ? PyTuple_Size(names) : 0; i-- > 0;) {
        if (PySet_Add(set, PyTuple_GetItem(names, i)) < 0) goto done;
    }
    PyObject *others = set ? PyNumber_Subtract(set, skip) : NULL;
    if (others != NULL && (tuple = PySequence_Tuple(others)) != NULL) rc = names_visit(&look, &all, tuple, NULL);
    Py_XDECREF(others);
done:
    Py_XDECREF(set);
    Py_XDECREF(tuple);
    containers_free(&all);
    return rc;
}

int grads_freeze(switch_call *call, const class_facts *facts, PyObject *layer, PyObject *dict, PyObject *declared,
                 PyObject *names) {
    containers all;
    if (containers_open(call->state, facts, layer, dict, &all) < 0) return -1;
    const visitor off = {call->state, &call->log, OFF, NULL};
    PyObject *iterator = PyObject_GetIter(names), *name;
    int rc = iterator ? 0 : -1;
    while (rc >= 0 && (name = PyIter_Next(iterator)) != NULL) {
        PyObject *frozen = PyDict_GetItemWithError(declared, name); /* the containers' names */
        for (int k = 0; frozen != NULL && rc >= 0 && k < all.count; k++) {
            const int listed = PySequence_Contains(frozen, all.items[k].name);
            PyObject *entry = listed > 0 ? container_get(&all.items[k], name) : NULL;
            rc = entry ? entry_visit(&off, entry) : PyErr_Occurred() ? -1 : 0;
            Py_XDECREF(entry);
        }
        Py_DECREF(name);
        if (PyErr_Occurred()) rc = -1;
    }
    Py_XDECREF(iterator);
    containers_free(&all);
    return rc < 0 || PyErr_Occurred() ? -1 : 0;
}
