/* work.h: requires_grad flags to read or turn, collected for all layers and then done stage by stage.
 *
 * What a model-wide switch costs is waiting for memory: a flag lies ten dependent loads behind its layer. Within a stage
 * the loads do not depend on each other, so that the processor waits for several at once. */
#ifndef PEFT_C_WORK_H
#define PEFT_C_WORK_H

#include "classes.h"
#include "journal.h"
#include "prefetch.h"

/* What to do with a flag. */
enum { OFF, ON, LIST };

typedef struct {
    PyObject *object;  /* owned: an entry of a container, a tensor or a module */
    PyObject *dict;    /* owned or NULL: a module's __dict__, then its parameters */
    PyObject *modules; /* owned or NULL: its `_modules` */
    char *note;        /* if not NULL, becomes 1 where a flag was set */
    int act, old;
} work_item;

typedef struct {
    work_item *items;
    size_t count, capacity;
    hint hints[PLACES]; /* in the __dict__ of the entries that are modules */
    footprint *past;    /* borrowed or NULL: what doing a list of these entries, in any order, has read before */
} worklist;             /* starts as zeros */

/* Adds an entry and takes its reference, also on failure. */
int work_add(worklist *work, PyObject *entry, int act, char *note);
/* Does all of it, in order. LIST appends (tensor, flag) to `list`. 0, or -1 with an exception, some of it done. */
int work_run(const module_state *state, journal *log, worklist *work, PyObject *list);
void work_free(worklist *work);

#endif
