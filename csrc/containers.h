/* containers.h: the per-adapter containers of tuner layers, seen as dicts adapter name -> entry. */
#ifndef PEFT_C_CONTAINERS_H
#define PEFT_C_CONTAINERS_H

#include "classes.h"

typedef struct {
    PyObject *name;    /* borrowed: the attribute's name */
    PyObject *object;  /* owned: the container */
    PyObject *dict;    /* owned or NULL: its __dict__ if it is a ModuleDict or a ParameterDict */
    PyObject *order;   /* owned: a dict whose keys are the adapter names, oldest first */
    PyObject *entries; /* owned: a dict with the entries (a ParameterDict may keep some elsewhere) */
    int32_t size;      /* number of adapter names */
} container;

typedef struct {
    container *items;
    size_t count, capacity;
} container_pool; /* starts as zeros */

/* Those of one layer: `count` in the pool from `first` on. */
typedef struct {
    PyObject *names; /* owned: the tuple adapter_layer_names */
    size_t first, count;
} containers;

/* Finds what layer.adapter_layer_names lists; `dict` is layer.__dict__. 0, or -1 with an exception and nothing to free. */
int containers_find(const module_state *state, const class_facts *facts, PyObject *layer, PyObject *dict,
                    container_pool *pool, containers *found);
/* Opens all that were found, of all layers. 0, or -1 with an exception. */
int containers_open(const module_state *state, container_pool *pool);
void containers_free(container_pool *pool);
/* The entry of `adapter`: new reference, or NULL (exception set only on failure). */
PyObject *container_get(const container *self, PyObject *adapter);

#endif
