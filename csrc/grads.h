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
 * A switch is planned for all layers, which queues flags to turn, then the flags are turned, then each layer notes it.
 * Everything here needs the GIL and returns 0, or -1 with an exception. */
#ifndef PEFT_C_GRADS_H
#define PEFT_C_GRADS_H

#include "containers.h"
#include "work.h"

enum { PLACED = 4 };

/* One call: its undo log, and what it found out for one layer that mostly holds for the next. All owned. */
typedef struct {
    const module_state *state;
    journal log;
    PyObject *names;  /* tuple: the adapters asked for; NULL if none were */
    PyObject *ledger; /* a layer's ledger, and the names to look at for it, without those asked for */
    PyObject *suspects;
    PyObject *written;      /* the ledger written last */
    hint places[2][PLACED]; /* where in the containers the first few of `suspects` and of `names` are */
    bool alone;             /* it is for one layer: to look for where an entry is would serve nobody after it */
    struct {                /* the last value of _disabled_trainable, what it was made of, and a ledger that has it */
        PyObject *names, *containers, *pairs, *ledger;
        const char *trainable; /* borrowed from a target */
    } paused;
} switch_call;

/* Makes call->names the names of one string or of an iterable. */
int switch_names(switch_call *call, PyObject *names);
/* Ends a call: takes everything back if rc < 0. Returns rc. */
int switch_end(switch_call *call, int rc);

/* A layer in a call. */
typedef struct {
    tuned_layer *of;    /* borrowed */
    PyObject *suspects; /* owned: the names that were looked at */
    char *trainable;    /* owned: 1 for each of them and each container that had a flag set */
    PyObject *memory;   /* owned: what enabling restores */
} target;

/* What is done to several layers at once. */
typedef struct {
    const container_pool *pool; /* borrowed: the containers of all of them */
    worklist work;
} stage;

void target_free(target *layer);
/* Asks for the memory that planning for a layer reads, by where the layers before have it. */
void grads_prefetch(const switch_call *call, const stage *self, const target *layer);

/* Trainable: the entries of the adapters in call->names unless frozen; every other entry is frozen. */
int grads_plan_set_adapter(switch_call *call, stage *self, target *layer, int frozen);
int grads_note_set_adapter(switch_call *call, stage *self, target *layer, int frozen);
/* Turns the flag of the entries of the adapters in call->names. */
int grads_plan_set(switch_call *call, stage *self, target *layer, int flag);
/* Freezes all entries; the note says in _disabled_trainable which were trainable. */
int grads_plan_disable(switch_call *call, stage *self, target *layer);
int grads_note_disable(switch_call *call, target *layer);
/* Writes _disabled_trainable; NULL: there is nothing to restore. */
int memory_write(switch_call *call, const target *layer, PyObject *memory);
/* Restores what `memory`, from _disabled_trainable, says. With `strict`, entries of the adapters in `strict` (any
 * iterable) that are not in it are frozen. */
int grads_plan_restore(switch_call *call, stage *self, target *layer, PyObject *memory, PyObject *strict);
/* Freezes the entries that `declared` (adapter -> names of containers) lists for the adapters in `names` (an iterable). */
int grads_plan_freeze(stage *self, const target *layer, PyObject *declared, PyObject *names);
/* Lists the entries that may be trainable and those of the adapters in call->names, without those in `skip` (a set). */
int grads_plan_list(switch_call *call, stage *self, target *layer, PyObject *skip);

#endif
