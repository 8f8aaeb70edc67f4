/* state.h: what one module object owns: interned names, torch's classes and functions, heap types, the torch table.
 *
 * To add a name, an object or a type, add one line to a list below. Every member is a strong reference that lives as
 * long as the module; use it as a borrowed reference. Only `fast`, `finish`,
 * `linear` and `spare` change after import. */
#ifndef PEFT_C_STATE_H
#define PEFT_C_STATE_H

#include "torch_shim.h"

/* X(identifier): the interned string "identifier", as state->names.identifier */
/* clang-format off */
#define STATE_NAMES(X)                                                                                           \
    X(__dlpack__) X(forward) X(base_layer) X(weight) X(bias) X(training) X(p) X(inplace) X(requires_grad)        \
    X(clone) X(new_empty) X(contiguous) X(cpu) X(_modules) X(_parameters) X(_forward_hooks) X(_forward_pre_hooks)             \
    X(_backward_hooks) X(_backward_pre_hooks) X(_compiled_call_impl) X(linear)                            \
    X(_global_forward_hooks) X(_global_forward_pre_hooks)                                                        \
    X(_global_backward_hooks) X(_global_backward_pre_hooks) X(_disable_adapters) X(_active_adapter)              \
    X(merged_adapters) X(cast_input_dtype_enabled) X(_lowrank_names) X(adapter_names) X(alora_offsets)           \
    X(_current_level) X(adapter_layer_names) X(other_param_names) X(frozen_peft_weight_names) X(_keys)           \
    X(is_leaf) X(set_adapter) X(enable_adapters) X(set_requires_grad) X(_freeze_non_trainable_peft_weights)      \
    X(active_adapters) X(inference_mode) X(named_modules) X(_adapter_ledger) X(_disabled_trainable)  \
    X(disable_adapters) X(_cdata)
/* clang-format on */

/* X(field, "module", "attribute.path"): an object fetched once at import, as state->objects.field */
#define STATE_OBJECTS(X) \
    X(Tensor, "torch", "Tensor") \
    X(Parameter, "torch.nn", "Parameter") \
    X(Module, "torch.nn", "Module") \
    X(ModuleDict, "torch.nn", "ModuleDict") \
    X(ParameterDict, "torch.nn", "ParameterDict") \
    X(Linear, "torch.nn", "Linear") \
    X(Dropout, "torch.nn", "Dropout") \
    X(Identity, "torch.nn", "Identity") \
    X(linear_forward, "torch.nn", "Linear.forward") \
    X(linear, "torch", "_C._nn.linear") \
    X(requires_grad, "torch", "Tensor.requires_grad") \
    X(is_neg, "torch", "Tensor.is_neg") \
    X(is_conj, "torch", "Tensor.is_conj") \
    X(is_autocast_enabled, "torch", "is_autocast_enabled") \
    X(function_modes, "torch", "_C._len_torch_function_stack") \
    X(dispatch_modes, "torch", "_C._len_torch_dispatch_stack") \
    X(functorch_top, "torch", "_C._functorch.peek_interpreter_stack") \
    X(is_functorch_tensor, "torch", "_C._functorch.is_functorch_wrapped_tensor") \
    X(tracing_state, "torch", "_C._get_tracing_state") \
    X(increment_version, "torch", "_C._increment_version") \
    X(forward_ad, "torch.autograd.forward_ad", "__dict__") \
    X(functional, "torch.nn.functional", "__dict__") \
    X(module_globals, "torch.nn.modules.module", "__dict__")

/* X(field): a heap type made by a unit's init function, as state->types.field */
#define STATE_TYPES(X) X(LayerBase) X(Tree)

/* Memory for the length of one call. */
typedef struct {
    void *data; /* aligned as malloc's, not initialised */
    size_t size;
} scratch;

typedef struct {
    torch_table torch;
    scratch spare;    /* what the last call gave back; {NULL, 0}: nothing */
    bool fast;        /* the switch of peft_c.fast */
    PyObject *finish; /* peft_c.fast._finish, imported when first needed */
    PyObject *linear; /* peft_c.fast._linear, the same */
    /* of objects.requires_grad, to be called without looking it up for each tensor; NULL if it is no descriptor */
    descrgetfunc requires_grad_get;
    descrsetfunc requires_grad_set;
#define X(name) PyObject *name;
    struct {
        STATE_NAMES(X)
    } names;
    struct {
        STATE_TYPES(X)
    } types;
#undef X
#define X(field, module, path) PyObject *field;
    struct {
        STATE_OBJECTS(X)
    } objects;
#undef X
} module_state;

/* The state of the module object `module` (borrowed memory; never NULL for an imported _C). */
static inline module_state *state_of(PyObject *module) {
    return (module_state *)PyModule_GetState(module);
}

int state_init(module_state *state); /* 0, or -1 with an exception: ImportError when torch is absent or too old */
int state_traverse(const module_state *state, visitproc visit, void *arg);
void state_clear(module_state *state);

/* With the GIL. scratch_take: at least `size` bytes, from the call before where that is enough: its pages are there
 * already, and asking the system for new ones costs more than a small merge. data NULL: there is no memory (no
 * exception is set). scratch_give takes it back, keeps it for the next call or, if more than a few megabytes of it
 * have been `used`, frees it. */
scratch scratch_take(module_state *state, size_t size);
void scratch_give(module_state *state, scratch block, size_t used);

/* For memory that is about to be written for the first time: in small pages, the pages of 64 MB take longer to come than
 * to fill. A hint, which changes nothing where there are no large pages. */
void ask_for_large_pages(void *data, size_t bytes);

#endif
