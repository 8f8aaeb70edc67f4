/* journal.h: the undo log of a model-wide change of flags and attributes. */
#ifndef PEFT_C_JOURNAL_H
#define PEFT_C_JOURNAL_H

#include "classes.h"

/* Undo log of a model-wide change: flags turned and dictionary items written, newest last. */
typedef struct {
    struct journal_entry {
        PyObject *object; /* a tensor, or the dict written to */
        PyObject *key;    /* NULL for a tensor */
        PyObject *old;    /* the earlier flag or item; NULL: there was none */
    } * entries;
    size_t count, capacity;
} journal;

int journal_add(journal *log, PyObject *object, PyObject *key, PyObject *old);
void journal_undo(const module_state *state, journal *log); /* takes everything back; keeps the current exception */
void journal_free(journal *log);

/* dict[key] = value (value NULL: None if the key is there), logged. */
int dict_write(journal *log, PyObject *dict, PyObject *key, PyObject *value, hint *where);

#endif
