/* containers.h: tuner layers and their per-adapter containers, seen as dicts adapter name -> entry. */
#ifndef PEFT_C_CONTAINERS_H
#define PEFT_C_CONTAINERS_H

#include "classes.h"
#include "prefetch.h"

typedef struct {
    PyObject *name;    /* borrowed: the attribute's name */
    PyObject *object;  /* owned: the container */
    PyObject *dict;    /* owned or NULL: its __dict__ if it is a ModuleDict or a ParameterDict */
    PyObject *order;   /* owned: a dict whose keys are the adapter names, oldest first */
    PyObject *entries; /* owned: a dict with the entries (a ParameterDict may keep some elsewhere) */
    int32_t size;      /* number of adapter names */
    bool copied;       /* order and entries are copies: it is a mapping of another class */
} container;

typedef struct {
    container *items;
    size_t count, capacity;
    hint hints[PLACES]; /* in the __dict__ of the containers */
    size_t measured;    /* counts how often their sizes were found to be others */
    footprint *past;    /* borrowed or NULL: what the last switch has read of the entries */
} container_pool;       /* starts as zeros */

/* A layer: any object that has BaseTunerLayer's attributes. What its adapter_layer_names lists is `count` containers in
 * a pool from `first` on, once they are opened. */
typedef struct {
    class_facts *facts; /* borrowed from a class table */
    PyObject *object;   /* owned */
    PyObject *dict;     /* owned: its __dict__ */
    PyObject *modules;  /* owned or NULL: its `_modules` */
    PyObject *names;    /* owned: the tuple adapter_layer_names */
    size_t first, count;
    bool steady;      /* its containers stay what they are as long as adapter_layer_names and `modules` do */
    PyObject *ledger; /* owned or NULL: the last one that was right for the sizes `measured` then */
    size_t measured;
    PyObject *last; /* owned or NULL: the last key of `dict` when it declared nothing (see layer_is_plain) */
    Py_ssize_t last_at, dict_size;
} tuned_layer; /* starts as zeros */

/* Fills in all but the containers. 0, or -1 with an exception; to be closed in both cases. */
int layer_open(const module_state *state, class_table *classes, PyObject *object, tuned_layer *self);
void layer_close(tuned_layer *self);
/* Whether the layer leaves to its class what names of containers and of frozen weights there are and what its methods
 * do: that was so when its __dict__ was looked through, and it has as many keys as then and the same last one; others
 * would come after it. */
bool layer_is_plain(const module_state *state, tuned_layer *self);
/* The same, where layer_is_plain has been asked in this call; false where it has not. */
static inline bool layer_was_plain(const tuned_layer *self) {
    return self->last != NULL && PyDict_Size(self->dict) == self->dict_size;
}
/* Whether the layer or its class has its own method `method`. Without exceptions. */
bool layer_has_own(const module_state *state, const tuned_layer *self, int method);
/* Opens the containers of layers, which the pool then has room for. 0, or -1 with an exception. */
int containers_open(const module_state *state, tuned_layer *const *layers, size_t count, container_pool *pool);
/* Reads the sizes again. 1 if one is another. */
int containers_measure(container_pool *pool);
/* Notes what switching a layer reads, down to the dicts that have its adapters. */
void layer_trace(const tuned_layer *self, const container_pool *pool, footprint *lines);
void containers_free(container_pool *pool);
/* The entry of `adapter`: new reference, or NULL (exception set only on failure). */
PyObject *container_get(const container *self, PyObject *adapter, hint *where);

#endif
