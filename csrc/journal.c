/* journal.c: see journal.h. */
#include "journal.h"

#include <string.h>

int journal_add(journal *log, PyObject *object, PyObject *key, PyObject *old) {
    if (log->count == log->capacity) {
        const size_t capacity = log->capacity ? 4 * log->capacity : 1024;
        struct journal_entry *entries = PyMem_Realloc(log->entries, capacity * sizeof *entries);
        if (entries == NULL) {
            PyErr_NoMemory();
            return -1;
        }
        log->entries = entries;
        log->capacity = capacity;
    }
    Py_INCREF(object);
    Py_XINCREF(key);
    Py_XINCREF(old);
    log->entries[log->count++] = (struct journal_entry){object, key, old};
    return 0;
}

void journal_undo(const module_state *state, journal *log) {
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    for (size_t i = log->count; i-- > 0;) {
        const struct journal_entry *entry = &log->entries[i];
        int failed;
        if (entry->key == NULL) {
            failed = PyObject_SetAttr(entry->object, state->names.requires_grad, entry->old);
        } else if (entry->old != NULL) {
            failed = PyDict_SetItem(entry->object, entry->key, entry->old);
        } else {
            failed = PyDict_DelItem(entry->object, entry->key);
        }
        if (failed < 0) PyErr_Clear();
    }
    PyErr_Restore(type, value, trace);
}

void journal_free(journal *log) {
    for (size_t i = 0; i < log->count; i++) {
        Py_DECREF(log->entries[i].object);
        Py_XDECREF(log->entries[i].key);
        Py_XDECREF(log->entries[i].old);
    }
    PyMem_Free(log->entries);
    memset(log, 0, sizeof *log);
}

int dict_write(journal *log, PyObject *dict, PyObject *key, PyObject *value, hint *where) {
    PyObject *old = dict_get(dict, key, where);
    if (old == NULL && PyErr_Occurred()) return -1;
    if (value == NULL && old != NULL) value = Py_None;
    if (old == value) return 0;
    return journal_add(log, dict, key, old) < 0 ? -1 : PyDict_SetItem(dict, key, value);
}
