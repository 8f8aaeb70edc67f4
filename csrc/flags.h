/* flags.h: reading and turning the requires_grad flags of tensors and of the entries of a layer's containers. */
#ifndef PEFT_C_FLAGS_H
#define PEFT_C_FLAGS_H

#include "containers.h"
#include "journal.h"

/* What to do with a flag. */
enum { OFF, ON, LIST };

typedef struct {
    const module_state *state;
    journal *log;
    int act;
    PyObject *list; /* for LIST: gets (tensor, flag) */
} visitor;

/* Visits the tensors of an entry: itself, or the parameters of a module. 1 if any had its flag set, 0, or -1 with an
 * exception. */
int entry_visit(const visitor *self, PyObject *entry);
/* Visits the entries of the adapters in `names` (a tuple) in all containers: 0, or -1 with an exception. `trainable`, if
 * given, has a byte for each name and container, which becomes 1 where the entry had its flag set. */
int names_visit(const visitor *self, const containers *all, PyObject *names, char *trainable);

#endif
