/* classes.h: what the classes of the objects met in one call are like, asked once a class instead of once an object. */
#ifndef PEFT_C_CLASSES_H
#define PEFT_C_CLASSES_H

#include "state.h"

/* Where a key was found last, in dicts that are much alike, such as the __dict__ of objects of one class. It is only
 * where to look first: a key that is not there is looked up. */
typedef struct {
    Py_ssize_t at; /* as PyDict_Next counts */
    int searched;  /* how often that was found out */
} hint;

/* dict[key]: borrowed, or NULL (exception set only on failure). */
PyObject *dict_search(PyObject *dict, PyObject *key, hint *where);
static inline PyObject *dict_get(PyObject *dict, PyObject *key, hint *where) {
    Py_ssize_t at = where->at;
    PyObject *found, *value;
    return PyDict_Next(dict, &at, &found, &value) && found == key ? value : dict_search(dict, key, where);
}

/* methods of Layer that a subclass may override */
enum { SET_ADAPTER, ENABLE_ADAPTERS, SET_REQUIRES_GRAD, FREEZE, METHODS };
/* attributes of a tuner layer, which are its class's as a rule */
enum { LAYER_NAMES, PARAM_NAMES, FROZEN_NAMES, MERGED_NAMES, ATTRIBUTES };
enum { CHILDREN = 16 };
/* what is read from the __dict__ of an object */
enum { MODULES, PARAMETERS, KEYS, LEDGER, ACTIVE, DISABLED, MEMORY, MERGED, PLACES };

typedef struct {
    PyTypeObject *type;               /* owned */
    int layer;                        /* a subclass of Layer */
    int plain;                        /* its children are those in `_modules` */
    int match;                        /* for whoever asks about all classes of a table */
    unsigned own;                     /* bit m: it has its own method m; all bits where it is no Layer */
    PyObject *attributes[ATTRIBUTES]; /* owned; NULL: only the object can tell */
    PyObject *containers;             /* owned: frozenset of the LAYER_NAMES and PARAM_NAMES in `attributes` */
    hint hints[PLACES];               /* in the __dict__ of its objects */
    hint in_modules[CHILDREN];        /* of each of the LAYER_NAMES in `_modules` of its objects */
    PyObject *children[CHILDREN];     /* owned or NULL: names of the children that its last object had, in order */
    int listed[CHILDREN];             /* whether they are in `containers` */
} class_facts;

typedef struct {
    class_facts **items;
    size_t count, capacity;
} class_table; /* starts as zeros */

/* Valid until the table is freed; NULL with an exception. */
class_facts *class_of(const module_state *state, class_table *table, PyTypeObject *type);
/* 1 if what is known of all classes of a table still holds, 0 if not, -1 with an exception. */
int classes_same(const module_state *state, const class_table *table);
void class_table_free(class_table *table);
PyObject *method_name(const module_state *state, int method); /* borrowed */
/* An attribute of `layer`, whose __dict__ is `dict`: new reference. */
PyObject *layer_attribute(const module_state *state, class_facts *facts, PyObject *layer, PyObject *dict,
                          int attribute);

#endif
