/* grads.h: which adapters of one tuner layer may be trainable, and turning their requires_grad flags.
 *
 * A tuner layer keeps its weights in containers (nn.ModuleDict, nn.ParameterDict or another mapping, adapter name ->
 * module or tensor) named by `adapter_layer_names`. So that switching does not depend on the number of inactive
 * adapters, the layer's __dict__ holds
 *   _adapter_ledger     (names that may be trainable: frozenset, number of entries per container: bytes of int32)
 *   _disabled_trainable while disabled: the (container, adapter) pairs that were trainable before, or absent.
 * Only ledger names, names asked for and entries added since are looked at, and the active ones. Where the ledger is missing or a container
 * has shrunk behind its back, every entry is. Everything here needs the GIL and returns 0, or -1 with an exception. */
#ifndef PEFT_C_GRADS_H
#define PEFT_C_GRADS_H

#include "journal.h"

/* Trainable: the entries of the adapters in `names` (a list) unless frozen; every other entry is frozen. */
int grads_set_adapter(const module_state *state, journal *log, PyObject *layer, PyObject *dict, PyObject *names,
                      int frozen);
/* Turns the flag of the entries of the adapters in `names` (a set). */
int grads_set(const module_state *state, journal *log, PyObject *layer, PyObject *dict, PyObject *names, int flag);
/* Freezes all entries; with `remember` notes which were trainable in _disabled_trainable. */
int grads_disable(const module_state *state, journal *log, PyObject *layer, PyObject *dict, int remember);
/* Restores what _disabled_trainable says and removes it. With `strict`, entries of `names` not in it are frozen. */
int grads_restore(const module_state *state, journal *log, PyObject *layer, PyObject *dict, PyObject *memory,
                  PyObject *strict);
/* Freezes the entries that `declared` (adapter -> names of containers) lists for the adapters in `names` (any iterable). */
int grads_freeze(const module_state *state, journal *log, PyObject *layer, PyObject *dict, PyObject *declared,
                 PyObject *names);
/* Appends to `list` (tensor, flag) of the entries that may be trainable and of the adapters in `also` (a list), without
 * those of the adapters in `skip` (a set). */
int grads_list(const module_state *state, PyObject *layer, PyObject *dict, PyObject *also, PyObject *skip,
               PyObject *list);

#endif
