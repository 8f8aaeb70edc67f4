/* tree.h: `_C.Tree`, which keeps what a walk over a model found, and the model-wide switches.
 *
 * Kept is where things are, never what they say: every call checks, link by link, that each module still has the class,
 * the __dict__, the `_modules` and in that the children that it had, in the same order, and that no class or layer has
 * changed what it declares; else it walks again. Taken for granted is only that a ModuleDict or ParameterDict that
 * stays in its place keeps its entries in the same dicts, as torch's own do for all their life. A tree does not keep
 * adapters alive: which there are is looked up in the live dicts.
 *
 * The model owns its tree, so the tree owns all but the model itself. While one call uses a tree, calls of other threads
 * walk for themselves. */
#ifndef PEFT_C_TREE_H
#define PEFT_C_TREE_H

#include "state.h"

int tree_init(PyObject *module, module_state *state);

#endif
