/* gate.h: may C act for a low-rank layer? The same computation, or a reason why not.
 *
 * A layer class opts in by a class attribute that names its parts:
 *     _lowrank_names = ("lora_A", "lora_B", "scaling", "lora_dropout", "lora_variant")
 * two ModuleDicts of nn.Linear (A (r, k) and B (n, r)), a dict of numbers, a ModuleDict of dropouts or None, and a
 * dict whose keys are the adapters that compute something else, or None. Its result is base(x) + sum over active
 * adapters of scaling * B(A(dropout(x))), in the dtype of base(x). */
#ifndef PEFT_C_GATE_H
#define PEFT_C_GATE_H

#include "view.h"

enum { GATE_MAX_TERMS = 16 };

/* X(NAME, path as users see it, reason) */
#define GATE_REASONS(X) \
    X(OK, "C", "plain layer on the CPU") \
    X(MERGED, "merged", "the adapter is merged: the base layer alone computes the result") \
    X(DISABLED, "disabled", "adapters are disabled: the base layer alone computes the result") \
    X(NO_ADAPTER, "base", "no active adapter on this layer: the base layer alone computes the result") \
    X(DISABLED_MERGED, "composed", "adapters are disabled while merged: the merge is taken back first") \
    X(SWITCHED_OFF, "composed", "fast paths are switched off (PEFT_C_FAST=0 or peft_c.fast_paths(False))") \
    X(NOT_LOWRANK, "composed", "this kind of layer has no C forward") \
    X(ODD, "composed", "an attribute of the layer is not of the usual type") \
    X(VARIANT, "composed", "the adapter is a variant with a forward of its own") \
    X(TOO_MANY, "composed", "more than 16 active adapters") \
    X(FACTOR_TYPE, "composed", "a factor is not exactly a torch.nn.Linear (subclass, parametrization, ...)") \
    X(FACTOR_HOOKS, "composed", "a factor has hooks or a replaced forward") \
    X(FACTOR_BIAS, "composed", "a factor has a bias (lora_bias=True)") \
    X(FACTOR_TENSOR, "composed", "a factor's weight is not exactly a torch.Tensor or Parameter") \
    X(FACTOR_VIEW, "composed", "a factor's weight") \
    X(FACTOR_SHAPE, "composed", "the shapes of input, A and B do not fit") \
    X(FACTOR_DTYPE, "composed", "A and B have different dtypes") \
    X(LINEAR_PATCHED, "composed", "torch.nn.Linear.forward or torch.nn.functional.linear was replaced") \
    X(DROPOUT, "composed", "the dropout is neither Identity nor a plain nn.Dropout (type, hooks, inplace)") \
    X(SCALING, "composed", "the scaling is not a number") \
    X(CAST_OFF, "composed", "input casting is off and the input's dtype differs from the adapter's") \
    X(INPUT_TENSOR, "composed", "the input is not exactly a torch.Tensor or Parameter") \
    X(INPUT_VIEW, "composed", "the input") \
    X(ARGUMENTS, "composed", "the call passes adapter_names or alora_offsets") \
    X(GLOBAL_HOOKS, "composed", "global module hooks are registered") \
    X(AUTOCAST, "composed", "autocast is on") \
    X(MODE, "composed", "a __torch_function__ or __torch_dispatch__ mode is active") \
    X(FUNCTORCH, "composed", "inside a torch.func transform") \
    X(TRACING, "composed", "torch.jit is tracing") \
    X(FORWARD_AD, "composed", "forward-mode autograd is active")

typedef enum {
#define X(name, path, text) GATE_##name,
    GATE_REASONS(X)
#undef X
} gate_reason;

typedef struct {
    PyObject *down, *up; /* owned: the weights of A (r, k) and B (n, r) */
    PyObject *dropout;   /* owned: the active dropout to apply to x first, or NULL */
    double scale, keep;  /* keep: 1 - p of the dropout */
} gate_term;

typedef struct {
    PyObject *base;          /* owned: the base layer; NULL until found */
    bool base_is_plain;      /* exactly nn.Linear without hooks: its output is fresh memory that nobody else holds */
    PyObject *weight, *bias; /* owned: what a plain base hands to F.linear, else NULL; bias may be None */
    bool base_bits;          /* must the base layer's product have torch's bits? */
    bool cast;               /* may x's dtype differ from the adapters'? */
    int count;               /* terms filled; 0: the base layer alone */
    view_status status;      /* with GATE_FACTOR_VIEW and GATE_INPUT_VIEW: what the view said */
    gate_term terms[GATE_MAX_TERMS];
} gate_plan;

/* Fills `plan` from the live layer: with its active adapters, or with the one called `only`. GATE_OK; GATE_MERGED, GATE_DISABLED, GATE_NO_ADAPTER: call the base alone;
 * anything else: the composed path. Never leaves an exception. The caller calls gate_release in every case. */
gate_reason gate_adapter(const module_state *state, PyObject *layer, PyObject *only, gate_plan *plan);
static inline gate_reason gate_layer(const module_state *state, PyObject *layer, gate_plan *plan) {
    return gate_adapter(state, layer, NULL, plan);
}

/* Takes the base layer from the layer's instance dict into the plan, and asks whether its output is its own. */
gate_reason gate_base(const module_state *state, PyObject *dict, gate_plan *plan);

/* What surrounds the call: switch, autocast, modes, functorch, tracing, forward AD, global hooks. */
gate_reason gate_ambient(const module_state *state);

/* Does `x` fit the plan's factors? On GATE_OK, `view` is x's. */
gate_reason gate_input(const module_state *state, PyObject *x, gate_plan *plan, TensorView *view);

void gate_release(gate_plan *plan);

int gate_init(PyObject *module, module_state *state); /* reads PEFT_C_FAST and PEFT_C_ISA */

extern PyMethodDef gate_methods[]; /* gate, set_fast, is_fast */

#endif
