/* prefetch.h: asking for memory ahead of its use, for many objects in a loop, so that the processor waits for all at once.
 *
 * Where to ask is guessed from how CPython and torch lay out their objects. A wrong guess costs time and nothing else: it
 * is never read through, but for a tensor's in work.c, which is compared with what torch says. */
#ifndef PEFT_C_PREFETCH_H
#define PEFT_C_PREFETCH_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <string.h>

/* An object: its header and, before that, where its __dict__ is. */
#define PREFETCH(object) (__builtin_prefetch((const char *)(object)-32), __builtin_prefetch(object))

/* Word number `word` of an object, which is a pointer or not. */
static inline const char *word_of(const PyObject *object, size_t word) {
    const char *value;
    memcpy(&value, (const char *)object + word * sizeof value, sizeof value);
    return value;
}

/* Where a dict (whose object should be there) keeps what it has about its keys, or their order where they are shared. */
static inline const char *keys_of(const PyObject *dict) {
    const char *const values = word_of(dict, 5);
    return values ? values - 24 : word_of(dict, 4);
}

/* Where item number `at` of a dict is whose table is no larger than so many items need. */
static inline const char *item_in(PyObject *dict, Py_ssize_t at, Py_ssize_t items) {
    const char *const values = word_of(dict, 5);
    if (values != NULL) return values + 8 * at;
    Py_ssize_t slots = 8;
    while (3 * items > 2 * slots) slots *= 2;
    return keys_of(dict) + 32 + (slots > 128 ? 2 : 1) * slots + 16 * at;
}

/* Where item number `at` of a dict is. */
static inline const char *item_of(PyObject *dict, Py_ssize_t at) {
    return item_in(dict, at, PyDict_Size(dict));
}

/* For how many items a dict has room, by its size in bytes: that of an object with many attributes is larger than its
 * items need. */
static inline Py_ssize_t room_of(PyObject *dict) {
    PyObject *bytes = PyObject_CallMethod(dict, "__sizeof__", NULL);
    const Py_ssize_t size = bytes ? PyLong_AsSsize_t(bytes) : 0;
    Py_XDECREF(bytes);
    PyErr_Clear();
    return (size - 80) / 19; /* its index has 1 or 2 bytes for each slot, and two thirds of the slots have 16 more */
}

/* What a dict keeps about its keys, and item number `at`. */
static inline void prefetch_item(PyObject *dict, Py_ssize_t at) {
    __builtin_prefetch(keys_of(dict));
    __builtin_prefetch(item_of(dict, at));
}

/* Addresses that a call has read, to be asked for in advance by the next one; they may be stale by then. */
typedef struct {
    const char **items;
    size_t count, capacity;
    uintptr_t of; /* of what, for whoever keeps it: equal numbers mean that it is worth asking for */
} footprint;      /* starts as zeros */

/* Asks for what is due before step `step` of `steps`, after `asked` were asked for (at once, they would be dropped).
 * Returns how many are by then. */
static inline size_t footprint_ask(const footprint *self, size_t asked, size_t step, size_t steps) {
    const size_t due = step < steps ? self->count * step / steps : self->count;
    for (; asked < due; asked++) __builtin_prefetch(self->items[asked]);
    return asked;
}

/* Adds one, if it is on another line than the one before. Without memory for it, it is left out. */
static inline void trace_add(footprint *self, const void *address) {
    if (self->count > 0 && (((uintptr_t)self->items[self->count - 1] ^ (uintptr_t)address) >> 6) == 0) return;
    if (self->count == self->capacity) {
        const size_t capacity = 2 * self->capacity + 1024;
        const char **items = PyMem_Realloc(self->items, capacity * sizeof *items);
        if (items == NULL) return;
        self->items = items;
        self->capacity = capacity;
    }
    self->items[self->count++] = address;
}

/* Adds the first three words of an object. */
static inline void trace_object(footprint *self, const PyObject *object) {
    trace_add(self, object);
    trace_add(self, (const char *)object + 16);
}

/* Adds a dict and its item number `at`. */
static inline void trace_item(footprint *self, PyObject *dict, Py_ssize_t at) {
    trace_add(self, dict);
    trace_add(self, (const char *)dict + 40);
    trace_add(self, keys_of(dict));
    trace_add(self, item_of(dict, at));
}

#endif
