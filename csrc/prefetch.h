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

/* Where item number `at` of a dict is. */
static inline const char *item_of(PyObject *dict, Py_ssize_t at) {
    const Py_ssize_t size = PyDict_Size(dict);
    Py_ssize_t slots = 8;
    while (3 * size > 2 * slots) slots *= 2;
    const char *const values = word_of(dict, 5);
    return values ? values + 8 * at : keys_of(dict) + 32 + (slots > 128 ? 2 : 1) * slots + 16 * at;
}

/* What a dict keeps about its keys, and item number `at`. */
static inline void prefetch_item(PyObject *dict, Py_ssize_t at) {
    __builtin_prefetch(keys_of(dict));
    __builtin_prefetch(item_of(dict, at));
}

/* Addresses that a call has read, to be asked for all at once by the next one; they may be stale by then. */
typedef struct {
    const char **items;
    size_t count, capacity;
} footprint; /* starts as zeros */

/* Adds one. Without memory for it, it is left out. */
static inline void trace_add(footprint *self, const void *address) {
    if (self->count == self->capacity) {
        const size_t capacity = 2 * self->capacity + 1024;
        const char **items = PyMem_Realloc(self->items, capacity * sizeof *items);
        if (items == NULL) return;
        self->items = items;
        self->capacity = capacity;
    }
    self->items[self->count++] = address;
}

#endif
