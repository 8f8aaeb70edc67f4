/* containers.h: the per-adapter containers of a tuner layer, seen as dicts adapter name -> entry. */
#ifndef PEFT_C_CONTAINERS_H
#define PEFT_C_CONTAINERS_H

#include "classes.h"

typedef struct {
    PyObject *name;    /* borrowed: the attribute's name */
    PyObject *object;  /* owned: the container */
    PyObject *order;   /* owned: a dict whose keys are the adapter names, oldest first */
    PyObject *entries; /* owned: a dict with the entries (a ParameterDict may keep some elsewhere) */
} container;

enum { CONTAINERS_MAX = 24 };

typedef struct {
    PyObject *names; /* owned: the tuple adapter_layer_names */
    int count;
    int32_t sizes[CONTAINERS_MAX];
    container items[CONTAINERS_MAX];
} containers;

/* Opens what layer.adapter_layer_names lists; `dict` is layer.__dict__. 0, or -1 with an exception and nothing to free. */
int containers_open(const module_state *state, const class_facts *facts, PyObject *layer, PyObject *dict,
                    containers *all);
void containers_free(containers *all);
/* The entry of `adapter`: new reference, or NULL (exception set only on failure). */
PyObject *container_get(const container *self, PyObject *adapter);

#endif
