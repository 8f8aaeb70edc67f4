/* prefetch.h: asking for memory ahead of its use, for many objects in a loop, so that the processor waits for all at once.
 *
 * Where to ask is guessed from how CPython and torch lay out their objects. A wrong guess costs time and nothing else: it
 * is never read through. */
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

/* What a dict (whose object should be there) keeps about its keys, and item number `at`. */
static inline void prefetch_item(PyObject *dict, Py_ssize_t at) {
    const char *const keys = word_of(dict, 4);
    Py_ssize_t slots = 8;
    while (3 * PyDict_Size(dict) > 2 * slots) slots *= 2;
    __builtin_prefetch(keys);
    __builtin_prefetch(keys + 32 + slots + 16 * at);
}

/* Torch's side of a tensor (whose object should be there). */
static inline void prefetch_tensor(const PyObject *tensor) {
    __builtin_prefetch(word_of(tensor, 2));
}

#endif
