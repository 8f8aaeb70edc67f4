/* classes.h: what the classes of the objects met in one call are like, asked once a class instead of once an object. */
#ifndef PEFT_C_CLASSES_H
#define PEFT_C_CLASSES_H

#include "state.h"

/* methods of Layer that a subclass may override */
enum { SET_ADAPTER, ENABLE_ADAPTERS, SET_REQUIRES_GRAD, FREEZE, METHODS };
/* attributes of a tuner layer, which are its class's as a rule */
enum { LAYER_NAMES, PARAM_NAMES, FROZEN_NAMES, ATTRIBUTES };

typedef struct {
    PyTypeObject *type;               /* owned */
    int layer;                        /* a subclass of Layer */
    int plain;                        /* its children are those in `_modules` */
    unsigned own;                     /* bit m: it has its own method m; all bits where it is no Layer */
    PyObject *attributes[ATTRIBUTES]; /* owned; NULL: only the object can tell */
    PyObject *containers;             /* owned: frozenset of the LAYER_NAMES and PARAM_NAMES in `attributes` */
} class_facts;

typedef struct {
    class_facts **items;
    size_t count, capacity;
} class_table; /* starts as zeros */

/* Valid until the table is freed; NULL with an exception. */
const class_facts *class_of(const module_state *state, class_table *table, PyTypeObject *type);
void class_table_free(class_table *table);
/* An attribute of `layer`, whose __dict__ is `dict`: new reference. */
PyObject *layer_attribute(const module_state *state, const class_facts *facts, PyObject *layer, PyObject *dict,
                          int attribute);

#endif
