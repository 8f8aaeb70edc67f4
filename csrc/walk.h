/* walk.h: a walk over the live `_modules` dicts.
 *
 * It visits what model.modules() visits, in its order, each module once, but leaves out the adapter containers of tuner
 * layers (they may hold thousands of adapters and hold no tuner layers). */
#ifndef PEFT_C_WALK_H
#define PEFT_C_WALK_H

#include "classes.h"
#include "prefetch.h"

/* A module. Its children are `count` indices in `edges` from `first` on. */
typedef struct {
    PyObject *module;   /* owned */
    PyObject *dict;     /* owned: its __dict__ */
    PyObject *children; /* owned or NULL: its `_modules`, if it is queued */
    class_facts *facts;
    size_t first, count;
    bool queued; /* its children are or will be read */
    bool flat;   /* it has said itself what modules there are below it; theirs are not asked for */
    bool seen;   /* is in the order */
} node;

typedef struct {
    const module_state *state;
    class_table classes;
    node *nodes;
    size_t *slots; /* open addressing by address: index of the node + 1 */
    size_t *edges, *queue, *order;
    struct found *row; /* what the level that is read now has below it */
    size_t node_count, node_capacity, slot_mask, edge_count, edge_capacity, queue_count, queue_capacity, row_count,
        row_capacity, order_count;
    bool root_borrowed; /* nodes[0].module is not owned */
} walk;                 /* starts as zeros and the state */

/* 0, or -1 with an exception; to be freed in both cases. */
int walk_run(walk *self, PyObject *root);
void walk_free(walk *self);
/* For each class (or tuple of classes) in `kinds` the list of its instances, in order: new tuple. */
PyObject *walk_list(walk *self, PyObject *const *kinds, Py_ssize_t count);
/* Sets the `match` of the facts of all classes met: 1 if it is one of `kind`, a class or a tuple of classes. */
int walk_match(const walk *self, PyObject *kind);

/* Notes what comparing a walk with the live dicts reads; its root is left out. */
void walk_trace(const walk *self, footprint *lines);

extern PyMethodDef walk_methods[]; /* find, set_adapter, enable_adapters, set_requires_grad, flags */

#endif
