/* grads.c: see grads.h. */
#include "grads.h"

#include <limits.h>
#include <string.h>

/* Puts a new reference to `value` in the place of an owned one. */
static void replace(PyObject **slot, PyObject *value) {
    PyObject *old = *slot;
    Py_XINCREF(value);
    *slot = value;
    Py_XDECREF(old);
}

/* The names of one string or of an iterable, each once and interned, as those of the adapters of a model are (see
 * inject.py), so that they are found by identity: new tuple. */
static PyObject *names_once(PyObject *names) {
    PyObject *all = PyUnicode_Check(names) ? PyTuple_Pack(1, names) : PySequence_Tuple(names), *result = NULL;
    PyObject *once = all ? PyDict_New() : NULL;
    int rc = once ? 0 : -1;
    for (Py_ssize_t i = 0; rc == 0 && i < PyTuple_Size(all); i++) {
        PyObject *name = Py_NewRef(PyTuple_GetItem(all, i));
        if (PyUnicode_CheckExact(name)) PyUnicode_InternInPlace(&name);
        rc = PyDict_SetItem(once, name, Py_None);
        Py_DECREF(name);
    }
    if (rc == 0) result = PySequence_Tuple(once);
    Py_XDECREF(all);
    Py_XDECREF(once);
    return result;
}

int switch_names(switch_call *call, PyObject *names) {
    PyObject *tuple = names_once(names);
    if (tuple == NULL) return -1;
    const int same = call->names ? PyObject_RichCompareBool(call->names, tuple, Py_EQ) : 0;
    if (same == 0) { /* what was found out holds for the names before */
        replace(&call->ledger, NULL);
        replace(&call->written, NULL);
        replace(&call->names, tuple);
        memset(call->places[1], 0, sizeof call->places[1]);
    }
    Py_DECREF(tuple);
    return same < 0 ? -1 : 0;
}

int switch_end(switch_call *call, int rc) {
    if (rc < 0) journal_undo(call->state, &call->log);
    journal_free(&call->log);
    Py_XDECREF(call->names);
    Py_XDECREF(call->ledger);
    Py_XDECREF(call->suspects);
    Py_XDECREF(call->written);
    Py_XDECREF(call->paused.names);
    Py_XDECREF(call->paused.containers);
    Py_XDECREF(call->paused.pairs);
    Py_XDECREF(call->paused.ledger);
    return rc;
}

/* --- layers and stages --- */

void target_free(target *layer) {
    Py_XDECREF(layer->suspects);
    PyMem_Free(layer->trainable);
    Py_XDECREF(layer->memory);
}

static container *containers_of(const stage *self, const target *layer) {
    return self->pool->items + layer->of->first;
}

/* Queues the entries of the adapters in `names` (a tuple). `notes`, if given, has a byte for each name and container. */
static int queue(switch_call *call, stage *self, const target *layer, PyObject *names, int act, char *notes) {
    const container *all = containers_of(self, layer);
    const size_t count = layer->of->count;
    hint other = {.searched = INT_MAX}, *const places = call->places[names == call->names];
    for (Py_ssize_t i = 0; i < PyTuple_Size(names); i++) {
        PyObject *const name = PyTuple_GetItem(names, i);
        hint *const place = i < PLACED && !call->alone ? &places[i] : &other;
        for (size_t k = 0; k < count; k++) {
            PyObject *entry = all[k].size ? container_get(&all[k], name, place) : NULL;
            if (entry == NULL && PyErr_Occurred()) return -1;
            if (entry != NULL && work_add(&self->work, entry, act, notes ? notes + (size_t)i * count + k : NULL) < 0) {
                return -1;
            }
        }
    }
    return 0;
}

void grads_prefetch(const switch_call *call, const stage *self, const target *layer) {
    const container *all = containers_of(self, layer);
    for (int i = 0; i < 2; i++) {
        for (const hint *place = call->places[i]; place < call->places[i] + PLACED && place->searched; place++) {
            for (size_t k = 0; k < layer->of->count; k++) {
                if (all[k].size) __builtin_prefetch(item_of(all[k].entries, place->at));
            }
        }
    }
}

/* --- the ledger --- */

static PyObject *ledger_of(const switch_call *call, const target *layer) {
    tuned_layer *const of = layer->of;
    PyObject *ledger = dict_get(of->dict, call->state->names._adapter_ledger, &of->facts->hints[LEDGER]);
    return ledger != NULL && PyTuple_Check(ledger) && PyTuple_Size(ledger) == 2 ? ledger : NULL;
}

static int ledger_set(switch_call *call, const target *layer, PyObject *ledger) {
    tuned_layer *const of = layer->of;
    return dict_write(&call->log, of->dict, call->state->names._adapter_ledger, ledger, &of->facts->hints[LEDGER]);
}

/* Numbers of entries that a ledger (may be NULL) was written for; NULL if it is not for these containers. `current`, if
 * given, becomes 1 if they are the same now. */
static const int32_t *ledger_sizes(PyObject *ledger, const container *all, size_t count, int *current) {
    PyObject *bytes = ledger ? PyTuple_GetItem(ledger, 1) : NULL;
    int same = 1;
    if (current != NULL) *current = 0;
    if (bytes == NULL || !PyBytes_Check(bytes)) return NULL;
    const int32_t *sizes = (const int32_t *)(const void *)PyBytes_AsString(bytes);
    if (PyBytes_Size(bytes) != (Py_ssize_t)(count * sizeof *sizes)) return NULL;
    for (size_t k = 0; k < count; k++) {
        if (all[k].size < sizes[k]) return NULL;
        same &= all[k].size == sizes[k];
    }
    if (current != NULL) *current = same;
    return sizes;
}

/* 1 if a ledger (may be NULL) was written for as many entries as there are now. */
static int ledger_is_current(const stage *self, const target *layer, PyObject *ledger) {
    tuned_layer *const of = layer->of;
    int current = 1;
    if (ledger != NULL && of->ledger == ledger && of->measured == self->pool->measured) return 1;
    ledger_sizes(ledger, containers_of(self, layer), of->count, &current);
    if (current) {
        replace(&of->ledger, ledger);
        of->measured = self->pool->measured;
    }
    return current;
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
static PyObject *suspects_collect(switch_call *call, PyObject *ledger, PyObject *active, const container *all,
                                  size_t count) {
    const int32_t *sizes = ledger_sizes(ledger, all, count, NULL);
    PyObject *set = PySet_New(sizes ? PyTuple_GetItem(ledger, 0) : NULL), *result = NULL;
    if (set == NULL) return NULL;
    for (size_t k = 0; k < count; k++) {
        const Py_ssize_t added = all[k].size - (sizes ? sizes[k] : 0);
        if (added > 0 && set_update_last(set, all[k].order, added) < 0) goto done;
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

/* Finds the names that may be trainable, by the ledger, by being active, or added since, and are not in call->names. */
static int find_suspects(switch_call *call, const stage *self, target *layer) {
    const container *all = containers_of(self, layer);
    int known = 0;
    tuned_layer *const of = layer->of;
    PyObject *ledger = ledger_of(call, layer);
    PyObject *active =
        PyErr_Occurred() ? NULL : dict_get(of->dict, call->state->names._active_adapter, &of->facts->hints[ACTIVE]);
    if (PyErr_Occurred()) return -1;
    const int current = ledger_is_current(self, layer, ledger);
    if (current && ledger == call->ledger && (known = covers(call, active)) < 0) return -1;
    if (!known) {
        PyObject *names = suspects_collect(call, ledger, active, all, layer->of->count);
        if (names == NULL) return -1;
        replace(&call->ledger, current ? ledger : NULL);
        replace(&call->suspects, names);
        memset(call->places[0], 0, sizeof call->places[0]);
        Py_DECREF(names);
    }
    replace(&layer->suspects, call->suspects);
    return 0;
}

/* 1 if a set has exactly the names of a tuple. */
static int same_names(PyObject *set, PyObject *names) {
    Py_ssize_t left = PyTuple_Size(names);
    int same = left == PySet_Size(set);
    while (same > 0 && left-- > 0) same = PySet_Contains(set, PyTuple_GetItem(names, left));
    return same;
}

/* A ledger of the adapters in `names` for containers of these sizes: new reference. */
static PyObject *ledger_new(PyObject *names, const container *all, size_t count) {
    PyObject *set = PyFrozenSet_New(names), *result = NULL;
    PyObject *bytes = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)(count * sizeof all->size));
    for (size_t k = 0; bytes != NULL && k < count; k++) {
        memcpy(PyBytes_AsString(bytes) + k * sizeof all->size, &all[k].size, sizeof all->size);
    }
    if (set != NULL && bytes != NULL) result = PyTuple_Pack(2, set, bytes);
    Py_XDECREF(set);
    Py_XDECREF(bytes);
    return result;
}

/* Writes the ledger of the adapters in `names` (a tuple), the same in all of one call. */
static int ledger_write(switch_call *call, const stage *self, const target *layer, PyObject *names) {
    const container *all = containers_of(self, layer);
    if (!ledger_is_current(self, layer, call->written)) {
        PyObject *ledger = ledger_of(call, layer);
        if (PyErr_Occurred()) return -1;
        int current = ledger_is_current(self, layer, ledger);
        if (current && (current = same_names(PyTuple_GetItem(ledger, 0), names)) < 0) return -1;
        ledger = current ? Py_NewRef(ledger) : ledger_new(names, all, layer->of->count);
        if (ledger == NULL) return -1;
        replace(&call->written, ledger);
        Py_DECREF(ledger);
    }
    return ledger_set(call, layer, call->written);
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
static int ledger_add(switch_call *call, const target *layer) {
    PyObject *ledger = ledger_of(call, layer);
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
    return ledger_set(call, layer, call->written);
}

/* --- the operations --- */

int grads_plan_set_adapter(switch_call *call, stage *self, target *layer, int frozen) {
    if (find_suspects(call, self, layer) < 0 || queue(call, self, layer, layer->suspects, OFF, NULL) < 0) return -1;
    return queue(call, self, layer, call->names, frozen ? OFF : ON, NULL);
}

int grads_note_set_adapter(switch_call *call, stage *self, target *layer, int frozen) {
    PyObject *nobody = frozen ? PyTuple_New(0) : NULL;
    const int rc = frozen && nobody == NULL ? -1 : ledger_write(call, self, layer, frozen ? nobody : call->names);
    Py_XDECREF(nobody);
    return rc;
}

int grads_plan_set(switch_call *call, stage *self, target *layer, int flag) {
    if (flag && ledger_add(call, layer) < 0) return -1;
    return queue(call, self, layer, call->names, flag ? ON : OFF, NULL);
}

int grads_plan_disable(switch_call *call, stage *self, target *layer) {
    if (find_suspects(call, self, layer) < 0) return -1;
    const size_t size = (size_t)PyTuple_Size(layer->suspects) * layer->of->count;
    if ((layer->trainable = PyMem_Calloc(size + 1, 1)) == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    return queue(call, self, layer, layer->suspects, OFF, layer->trainable);
}

/* The pairs (container, adapter) that were trainable: new tuple. Layers that are alike share it. */
static PyObject *paused_pairs(switch_call *call, const target *layer) {
    PyObject *const names = layer->suspects, *const containers = layer->of->names;
    const Py_ssize_t count = (Py_ssize_t)layer->of->count, size = count * PyTuple_Size(names);
    if (call->paused.names == names && call->paused.containers == containers &&
        memcmp(call->paused.trainable, layer->trainable, (size_t)size) == 0) {
        return Py_NewRef(call->paused.pairs);
    }
    PyObject *list = PyList_New(0), *pairs = NULL;
    for (Py_ssize_t i = 0; list != NULL && i < size; i++) {
        if (!layer->trainable[i]) continue;
        PyObject *pair = PyTuple_Pack(2, PyTuple_GetItem(containers, i % count), PyTuple_GetItem(names, i / count));
        if (pair == NULL || PyList_Append(list, pair) < 0) Py_CLEAR(list);
        Py_XDECREF(pair);
    }
    if (list != NULL) pairs = PyList_AsTuple(list);
    Py_XDECREF(list);
    if (pairs != NULL) {
        replace(&call->paused.names, names);
        replace(&call->paused.containers, containers);
        replace(&call->paused.pairs, pairs);
        call->paused.trainable = layer->trainable;
    }
    return pairs;
}

int memory_write(switch_call *call, const target *layer, PyObject *memory) {
    tuned_layer *const of = layer->of;
    return dict_write(&call->log, of->dict, call->state->names._disabled_trainable, memory, &of->facts->hints[MEMORY]);
}

int grads_note_disable(switch_call *call, target *layer) {
    PyObject *pairs = paused_pairs(call, layer);
    const int rc = pairs ? memory_write(call, layer, pairs) : -1;
    Py_XDECREF(pairs);
    return rc;
}

/* Notes in the layer's ledger, if it has one, the adapters of all pairs in `memory`. */
static int ledger_restore(switch_call *call, const target *layer, PyObject *memory) {
    PyObject *ledger = ledger_of(call, layer);
    if (ledger == NULL) return PyErr_Occurred() ? -1 : 0;
    if (ledger == call->paused.ledger && memory == call->paused.pairs) return 0;
    PyObject *result = Py_NewRef(ledger);
    for (Py_ssize_t i = 0; result != NULL && i < PyTuple_Size(memory); i++) {
        PyObject *name = PyTuple_GetItem(PyTuple_GetItem(memory, i), 1),
                 *more = name ? ledger_with(result, name) : NULL;
        Py_DECREF(result);
        result = more;
    }
    const int rc = result ? ledger_set(call, layer, result) : -1;
    replace(&call->paused.pairs, memory);
    replace(&call->paused.ledger, result);
    Py_XDECREF(result);
    return rc;
}

/* Queues the entry that a pair (container, adapter) names, to become trainable. */
static int restore_pair(switch_call *call, stage *self, const target *layer, PyObject *pair) {
    const container *all = containers_of(self, layer);
    PyObject *const list = PyTuple_GetItem(pair, 0), *const name = PyTuple_GetItem(pair, 1);
    if (name == NULL) return -1;
    const size_t count = layer->of->count;
    size_t k = 0;
    while (k < count && all[k].name != list) k++;
    if (k == count) { /* an equal string, after pickling for one */
        for (k = 0; k < count && PyUnicode_Compare(all[k].name, list) != 0;) k++;
    }
    hint other = {.searched = INT_MAX}, *const place = call->alone ? &other : &call->places[0][0];
    PyObject *entry = k < count && all[k].size ? container_get(&all[k], name, place) : NULL;
    if (entry != NULL) return work_add(&self->work, entry, ON, NULL);
    return PyErr_Occurred() ? -1 : 0;
}

int grads_plan_restore(switch_call *call, stage *self, target *layer, PyObject *memory, PyObject *strict) {
    PyObject *active = strict ? PySequence_Tuple(strict) : NULL;
    int rc = strict != NULL ? (active ? queue(call, self, layer, active, OFF, NULL) : -1) : 0;
    if (rc == 0) rc = ledger_restore(call, layer, memory);
    for (Py_ssize_t i = 0; rc == 0 && i < PyTuple_Size(memory); i++) {
        rc = restore_pair(call, self, layer, PyTuple_GetItem(memory, i));
    }
    Py_XDECREF(active);
    return rc;
}

int grads_plan_freeze(stage *self, const target *layer, PyObject *declared, PyObject *names) {
    const container *all = containers_of(self, layer);
    PyObject *iterator = PyObject_GetIter(names), *name;
    int rc = iterator ? 0 : -1;
    while (rc == 0 && (name = PyIter_Next(iterator)) != NULL) {
        PyObject *frozen = PyDict_GetItemWithError(declared, name); /* the containers' names */
        for (size_t k = 0; frozen != NULL && rc == 0 && k < layer->of->count; k++) {
            const int listed = PySequence_Contains(frozen, all[k].name);
            hint place = {.searched = INT_MAX};
            PyObject *entry = listed > 0 ? container_get(&all[k], name, &place) : NULL;
            rc = entry ? work_add(&self->work, entry, OFF, NULL) : PyErr_Occurred() ? -1 : 0;
        }
        Py_DECREF(name);
        if (PyErr_Occurred()) rc = -1;
    }
    Py_XDECREF(iterator);
    return rc < 0 || PyErr_Occurred() ? -1 : 0;
}

int grads_plan_list(switch_call *call, stage *self, target *layer, PyObject *skip) {
    if (find_suspects(call, self, layer) < 0) return -1;
    PyObject *all = PySequence_Concat(layer->suspects, call->names), *set = all ? PySet_New(all) : NULL;
    PyObject *others = set ? PyNumber_Subtract(set, skip) : NULL, *names = others ? PySequence_Tuple(others) : NULL;
    const int rc = names ? queue(call, self, layer, names, LIST, NULL) : -1;
    Py_XDECREF(all);
    Py_XDECREF(set);
    Py_XDECREF(others);
    Py_XDECREF(names);
    return rc;
}
