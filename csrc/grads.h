/* grads.h: which adapters of one tuner layer may be trainable, and turning their requires_grad flags.
 *
 * A tuner layer keeps its weights in containers (nn.ModuleDict, nn.ParameterDict or another mapping, adapter name ->
 * module or tensor) named by `adapter_layer_names`. So that switching does not depend on the number of inactive
 * adapters, the layer's __dict__ holds
 *   _adapter_ledger     (names that may be trainable: frozenset, number of entries per container: bytes of int32)
 *   _disabled_trainable while disabled: the (container, adapter) pairs that were trainable before, or absent.
 * Looked at are only the names in the ledger, the active ones, those asked for and entries added since. Where the
 * ledger is missing or a container has shrunk behind its back, every entry is. Layers in the same state share one
 * ledger, so that what follows from it is found once a call.
 *
 * `dict` is the layer's __dict__. Everything here needs the GIL and returns 0, or -1 with an exception. */
#ifndef PEFT_C_GRADS_H
#define PEFT_C_GRADS_H

#include "classes.h"
#include "journal.h"

/* One call: its undo log, and what it found out for one layer that mostly holds for the next. All owned. */
typedef struct {
    const module_state *state;
    journal log;
    class_table classes;
    PyObject *names;  /* tuple: the adapters asked for; NULL if none were */
    PyObject *ledger; /* a layer's ledger, and the names to look at for it, without those asked for */
    PyObject *suspects;
    PyObject *written; /* the ledger written last */
    struct {           /* the last value of _disabled_trainable, and what it was made of */
        PyObject *names, *containers, *trainable, *pairs;
    } paused;
} switch_call;

/* Makes call->names the names of one string or of an iterable. */
int switch_names(switch_call *call, PyObject *names);
/* Ends a call: takes everything back if rc < 0. Returns rc. */
int switch_end(switch_call *call, int rc);

/* Trainable: the entries of the adapters in call->names unless frozen; every other entry is frozen. */
int grads_set_adapter(switch_call *call, const class_facts *facts, PyObject *layer, PyObject *dict, int frozen);
/* Turns the flag of the entries of the adapters in call->names. */
int grads_set(switch_call *call, const class_facts *facts, PyObject *layer, PyObject *dict, int flag);
/* Freezes all entries; with `remember` notes which were trainable in _disabled_trainable. */
int grads_disable(switch_call *call, const class_facts *facts, PyObject *layer, PyObject *dict, int remember);
/* Restores what `memory`, from _disabled_trainable, says and removes it there. With `strict`, entries of the adapters in
 * `strict` (any iterable) that are not in it are frozen. */
int grads_restore(switch_call *call, const class_facts *facts, PyObject *layer, PyObject *dict, PyObject *memory,
                  PyObject *strict);
/* Freezes the entries that `declared` (adapter -> names of containers) lists for the adapters in `names` (an iterable). */
int grads_freeze(switch_call *call, const class_facts *facts, PyObject *layer, PyObject *dict, PyObject *declared,
                 PyObject *names);
/* Appends to `list` (tensor, flag) of the entries that may be trainable and of the adapters in call->names, without
 * those of the adapters in `skip` (a set). */
int grads_list(switch_call *call, const class_facts *facts, PyObject *layer, PyObject *dict, PyObject *skip,
               PyObject *list);

#endif
