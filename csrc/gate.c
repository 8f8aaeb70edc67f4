/* gate.c: the conditions under which C computes what the composed PyTorch path would. */
#include "gate.h"

#include <stdlib.h>
#include <string.h>

/* ---------------------------------------------------------------------------------------------------- small looks */

/* dict[name], borrowed; NULL when absent or when `dict` is no dict. No exception. */
static PyObject *look(PyObject *dict, PyObject *name) {
    PyObject *value;
    if (dict == NULL || !PyDict_Check(dict)) return NULL;
    value = PyDict_GetItemWithError(dict, name);
    if (value == NULL) PyErr_Clear();
    return value;
}

static bool holds_any(PyObject *dict, PyObject *name) {
    PyObject *value = look(dict, name);
    return value != NULL && (!PyDict_Check(value) || PyDict_Size(value) != 0);
}

/* The instance dict. New reference, or NULL without an exception. */
static PyObject *instance_dict(PyObject *object) {
    PyObject *dict = PyObject_GenericGetDict(object, NULL);
    if (dict == NULL) PyErr_Clear();
    return dict;
}

/* Instance attribute, else the class's. New reference, or NULL without an exception. */
static PyObject *attribute(PyObject *dict, PyObject *object, PyObject *name) {
    PyObject *value = look(dict, name);
    if (value != NULL) {
        Py_INCREF(value);
        return value;
    }
    value = PyObject_GetAttr(object, name);
    if (value == NULL) PyErr_Clear();
    return value;
}

static bool is_exactly(PyObject *object, PyObject *type) {
    return (const void *)Py_TYPE(object) == (const void *)type;
}

/* No hook that a call of this module would run, and no forward set on the instance. */
static bool is_bare(const module_state *state, PyObject *dict) {
    return !holds_any(dict, state->names._forward_hooks) && !holds_any(dict, state->names._forward_pre_hooks) &&
           !holds_any(dict, state->names._backward_hooks) && !holds_any(dict, state->names._backward_pre_hooks) &&
           look(dict, state->names.forward) == NULL;
}

/* ----------------------------------------------------------------------------------------------------- the factors */

/* The weight of an adapter's nn.Linear, as a new reference in *weight. */
static gate_reason factor_weight(const module_state *state, PyObject *linear, PyObject **weight) {
    PyObject *dict, *parameters, *found;
    gate_reason reason = GATE_OK;
    *weight = NULL;
    if (!is_exactly(linear, state->objects.Linear)) return GATE_FACTOR_TYPE;
    dict = instance_dict(linear);
    parameters = look(dict, state->names._parameters);
    found = look(parameters, state->names.weight);
    if (found == NULL) {
        reason = GATE_FACTOR_TYPE;
    } else if (!is_bare(state, dict)) {
        reason = GATE_FACTOR_HOOKS;
    } else if ((parameters = look(parameters, state->names.bias)) != NULL && parameters != Py_None) {
        reason = GATE_FACTOR_BIAS;
    } else if (!view_is_plain(state, found)) {
        reason = GATE_FACTOR_TENSOR;
    } else {
        Py_INCREF(found);
        *weight = found;
    }
    Py_XDECREF(dict);
    return reason;
}

/* The number `value`; false when it is none. */
static bool number(PyObject *value, double *out) {
    if (value == NULL || !(PyFloat_Check(value) || PyLong_Check(value))) return false;
    *out = PyFloat_AsDouble(value);
    if (*out == -1.0 && PyErr_Occurred()) {
        PyErr_Clear();
        return false;
    }
    return true;
}

/* Sets term->dropout when the module would change x now. */
static gate_reason factor_dropout(const module_state *state, PyObject *module, gate_term *term) {
    PyObject *dict;
    gate_reason reason = GATE_DROPOUT;
    const bool is_dropout = is_exactly(module, state->objects.Dropout);
    double p = 0.0;
    term->keep = 1.0;
    if (!is_dropout && !is_exactly(module, state->objects.Identity)) return GATE_DROPOUT;
    dict = instance_dict(module);
    if (dict == NULL || !is_bare(state, dict)) goto done;
    reason = GATE_OK;
    if (!is_dropout || look(dict, state->names.training) == Py_False) goto done;
    if (look(dict, state->names.training) != Py_True || !number(look(dict, state->names.p), &p) ||
        look(dict, state->names.inplace) != Py_False) {
        reason = GATE_DROPOUT;
    } else if (p != 0.0) {
        Py_INCREF(module);
        term->dropout = module;
        term->keep = 1.0 - p;
    }
done:
    Py_XDECREF(dict);
    return reason;
}

/* The parts of a layer, found once a call; all borrowed from the layer's dicts, which the caller keeps alive. */
typedef struct {
    PyObject *down, *up, *scaling, *dropout, *variant; /* dicts by adapter name; dropout and variant may be NULL */
} layer_parts;

/* One adapter as a term of the plan; leaves the plan alone when the layer does not have it. */
static gate_reason plan_adapter(const module_state *state, const layer_parts *parts, PyObject *name, gate_plan *plan) {
    PyObject *down = look(parts->down, name), *up = look(parts->up, name), *dropout = look(parts->dropout, name);
    gate_term *term = &plan->terms[plan->count];
    gate_reason reason;
    if (down == NULL) return GATE_OK;
    if (up == NULL) return GATE_ODD;
    if (parts->variant != NULL && look(parts->variant, name) != NULL) return GATE_VARIANT;
    if (plan->count == GATE_MAX_TERMS) return GATE_TOO_MANY;
    if (!number(look(parts->scaling, name), &term->scale)) return GATE_SCALING;
    memset(term, 0, offsetof(gate_term, scale));
    plan->count++;
    if ((reason = factor_weight(state, down, &term->down)) != GATE_OK) return reason;
    if ((reason = factor_weight(state, up, &term->up)) != GATE_OK) return reason;
    if (parts->dropout == NULL) {
        term->keep = 1.0;
        return GATE_OK;
    }
    return dropout != NULL ? factor_dropout(state, dropout, term) : GATE_ODD;
}

static gate_reason plan_adapters(const module_state *state, const layer_parts *parts, PyObject *active,
                                 gate_plan *plan) {
    gate_reason reason = GATE_OK;
    Py_ssize_t count;
    if (PyUnicode_Check(active)) {
        reason = plan_adapter(state, parts, active, plan);
    } else if (PyList_Check(active)) {
        for (Py_ssize_t i = 0; i < PyList_Size(active) && reason == GATE_OK; i++) {
            reason = plan_adapter(state, parts, PyList_GetItem(active, i), plan);
        }
    } else if (PyTuple_Check(active)) {
        count = PyTuple_Size(active);
        for (Py_ssize_t i = 0; i < count && reason == GATE_OK; i++) {
            reason = plan_adapter(state, parts, PyTuple_GetItem(active, i), plan);
        }
    } else {
        reason = GATE_ODD;
    }
    if (reason == GATE_OK && plan->count == 0) reason = GATE_NO_ADAPTER;
    return reason;
}

/* ------------------------------------------------------------------------------------------------------- the layer */

/* The dict of adapters behind attribute names[index]: a ModuleDict's _modules, or a plain dict. Borrowed from a dict
 * that lives as long as the layer is not changed; NULL when absent. */
static PyObject *part_find(const module_state *state, PyObject *dict, PyObject *modules, PyObject *names,
                           Py_ssize_t index) {
    PyObject *name = PyTuple_GetItem(names, index), *found, *inner, *adapters;
    if (name == NULL || name == Py_None) {
        PyErr_Clear();
        return NULL;
    }
    if ((found = look(dict, name)) != NULL && PyDict_Check(found)) return found;
    if ((found = look(modules, name)) == NULL || (inner = instance_dict(found)) == NULL) return NULL;
    adapters = look(inner, state->names._modules);
    Py_DECREF(inner); /* the module keeps it */
    return adapters;
}

/* Plans the adapter `only`, or the active ones when it is NULL. */
static gate_reason plan_layer(const module_state *state, PyObject *layer, PyObject *dict, PyObject *names,
                              PyObject *only, gate_plan *plan) {
    PyObject *modules = look(dict, state->names._modules), *active = NULL;
    layer_parts parts;
    gate_reason reason;
    if (!PyTuple_Check(names) || PyTuple_Size(names) != 5) return GATE_NOT_LOWRANK;
    parts.down = part_find(state, dict, modules, names, 0);
    parts.up = part_find(state, dict, modules, names, 1);
    parts.scaling = part_find(state, dict, modules, names, 2);
    parts.dropout = part_find(state, dict, modules, names, 3);
    parts.variant = part_find(state, dict, modules, names, 4);
    if (parts.down == NULL || parts.up == NULL || parts.scaling == NULL) return GATE_ODD;
    plan->cast = look(dict, state->names.cast_input_dtype_enabled) != Py_False;
    if (only != NULL) return plan_adapters(state, &parts, only, plan);
    active = attribute(dict, layer, state->names._active_adapter);
    reason = active != NULL ? plan_adapters(state, &parts, active, plan) : GATE_ODD;
    Py_XDECREF(active);
    return reason;
}

/* Takes weight and bias of a plain base layer that its forward would find under these names. */
static void plan_linear(const module_state *state, PyObject *dict, gate_plan *plan) {
    PyObject *parameters = look(dict, state->names._parameters), *compiled;
    PyObject *weight = look(parameters, state->names.weight), *bias = look(parameters, state->names.bias);
    if (weight == NULL || bias == NULL || look(dict, state->names.weight) != NULL) return;
    if (look(dict, state->names.bias) != NULL) return;
    compiled = look(dict, state->names._compiled_call_impl);
    if (compiled != NULL && compiled != Py_None) return;
    Py_INCREF(weight);
    Py_INCREF(bias);
    plan->weight = weight;
    plan->bias = bias;
}

gate_reason gate_base(const module_state *state, PyObject *dict, gate_plan *plan) {
    PyObject *base = look(look(dict, state->names._modules), state->names.base_layer), *base_dict;
    if (base == NULL) return GATE_ODD;
    Py_INCREF(base);
    plan->base = base;
    if (is_exactly(base, state->objects.Linear)) {
        base_dict = instance_dict(base);
        plan->base_is_plain = base_dict != NULL && is_bare(state, base_dict);
        if (plan->base_is_plain) plan_linear(state, base_dict, plan);
        Py_XDECREF(base_dict);
    }
    return GATE_OK;
}

static bool is_true(PyObject *value) {
    const int yes = value != NULL ? PyObject_IsTrue(value) : 0;
    if (yes < 0) PyErr_Clear();
    return yes == 1;
}

gate_reason gate_adapter(const module_state *state, PyObject *layer, PyObject *only, gate_plan *plan) {
    PyObject *dict = instance_dict(layer), *names = NULL, *merged = NULL, *disabled = NULL;
    gate_reason reason = GATE_NOT_LOWRANK;
    plan->base = NULL;
    plan->base_is_plain = plan->base_bits = false;
    plan->weight = plan->bias = NULL;
    plan->count = 0;
    plan->status = VIEW_OK;
    names = dict ? PyObject_GetAttr((PyObject *)Py_TYPE(layer), state->names._lowrank_names) : NULL;
    if (names == NULL) goto done;
    if ((reason = gate_base(state, dict, plan)) != GATE_OK) goto done;
    merged = attribute(dict, layer, state->names.merged_adapters);
    disabled = attribute(dict, layer, state->names._disable_adapters);
    if (is_true(disabled)) {
        reason = is_true(merged) ? GATE_DISABLED_MERGED : GATE_DISABLED;
    } else if (is_true(merged)) {
        reason = GATE_MERGED;
    } else {
        reason = plan_layer(state, layer, dict, names, only, plan);
    }
done:
    if (names == NULL) PyErr_Clear();
    Py_XDECREF(merged);
    Py_XDECREF(disabled);
    Py_XDECREF(names);
    Py_XDECREF(dict);
    return reason;
}

void gate_release(gate_plan *plan) {
    for (int i = 0; i < plan->count; i++) {
        Py_CLEAR(plan->terms[i].down);
        Py_CLEAR(plan->terms[i].up);
        Py_CLEAR(plan->terms[i].dropout);
    }
    plan->count = 0;
    Py_CLEAR(plan->base);
    Py_CLEAR(plan->weight);
    Py_CLEAR(plan->bias);
}

/* ------------------------------------------------------------------------------------------------- input, ambient */

gate_reason gate_input(const module_state *state, PyObject *x, gate_plan *plan, TensorView *view) {
    TensorView a, b;
    if (!view_is_plain(state, x)) return GATE_INPUT_TENSOR;
    if ((plan->status = view_peek(state, x, view)) != VIEW_OK) return GATE_INPUT_VIEW;
    if (view->ndim == 0) return GATE_FACTOR_SHAPE;
    for (int i = 0; i < plan->count; i++) {
        const gate_term *term = &plan->terms[i];
        if ((plan->status = view_peek(state, term->down, &a)) != VIEW_OK) return GATE_FACTOR_VIEW;
        if ((plan->status = view_peek(state, term->up, &b)) != VIEW_OK) return GATE_FACTOR_VIEW;
        if (a.ndim != 2 || b.ndim != 2 || a.shape[1] != view->shape[view->ndim - 1] || a.shape[0] != b.shape[1]) {
            return GATE_FACTOR_SHAPE;
        }
        if (a.dtype != b.dtype) return GATE_FACTOR_DTYPE;
        if (!plan->cast && a.dtype != view->dtype) return GATE_CAST_OFF;
    }
    return GATE_OK;
}

/* Truth of what a function without arguments (or with one) returns; an error counts as yes. */
static bool says_yes(PyObject *function, PyObject *argument) {
    PyObject *answer =
        argument ? PyObject_CallFunctionObjArgs(function, argument, NULL) : PyObject_CallNoArgs(function);
    int yes = 1;
    if (answer == Py_None || answer == Py_False) {
        yes = 0;
    } else if (answer != NULL) {
        yes = PyObject_IsTrue(answer);
    }
    if (yes < 0 || answer == NULL) PyErr_Clear();
    Py_XDECREF(answer);
    return yes != 0;
}

gate_reason gate_ambient(const module_state *state) {
    PyObject *globals = state->objects.module_globals, *level, *forward;
    bool patched;
    if (!state->fast) return GATE_SWITCHED_OFF;
    if (holds_any(globals, state->names._global_forward_hooks) ||
        holds_any(globals, state->names._global_forward_pre_hooks) ||
        holds_any(globals, state->names._global_backward_hooks) ||
        holds_any(globals, state->names._global_backward_pre_hooks)) {
        return GATE_GLOBAL_HOOKS;
    }
    forward = PyObject_GetAttr(state->objects.Linear, state->names.forward);
    patched = forward != state->objects.linear_forward ||
              look(state->objects.functional, state->names.linear) != state->objects.linear;
    if (forward == NULL) PyErr_Clear();
    Py_XDECREF(forward);
    if (patched) return GATE_LINEAR_PATCHED;
    level = look(state->objects.forward_ad, state->names._current_level);
    if (level == NULL || PyLong_AsLong(level) >= 0) return GATE_FORWARD_AD;
    if (says_yes(state->objects.function_modes, NULL) || says_yes(state->objects.dispatch_modes, NULL))
        return GATE_MODE;
    if (says_yes(state->objects.functorch_top, NULL)) return GATE_FUNCTORCH;
    if (says_yes(state->objects.tracing_state, NULL)) return GATE_TRACING;
    if (says_yes(state->objects.is_autocast_enabled, state->names.cpu)) return GATE_AUTOCAST;
    return GATE_OK;
}

/* -------------------------------------------------------------------------------------------------------- Python */

static const char *reason_path(gate_reason reason) {
    static const char *const paths[] = {
#define X(name, path, text) [GATE_##name] = path,
        GATE_REASONS(X)
#undef X
    };
    return paths[reason];
}

static const char *reason_text(gate_reason reason) {
    static const char *const texts[] = {
#define X(name, path, text) [GATE_##name] = text,
        GATE_REASONS(X)
#undef X
    };
    return texts[reason];
}

static const char *reason_name(gate_reason reason) {
    static const char *const names[] = {
#define X(name, path, text) [GATE_##name] = #name,
        GATE_REASONS(X)
#undef X
    };
    return names[reason];
}

/* Without an input: the factors alone must have views. */
static gate_reason gate_factors(const module_state *state, gate_plan *plan) {
    TensorView a;
    for (int i = 0; i < plan->count; i++) {
        if ((plan->status = view_peek(state, plan->terms[i].down, &a)) != VIEW_OK) return GATE_FACTOR_VIEW;
        if ((plan->status = view_peek(state, plan->terms[i].up, &a)) != VIEW_OK) return GATE_FACTOR_VIEW;
    }
    return GATE_OK;
}

static PyObject *gate_gate(PyObject *module, PyObject *args) {
    const module_state *state = state_of(module);
    PyObject *layer = NULL, *x = NULL, *result = NULL;
    TensorView view;
    gate_plan plan;
    gate_reason reason;
    if (!PyArg_ParseTuple(args, "O|O:gate", &layer, &x)) return NULL;
    reason = gate_layer(state, layer, &plan);
    if (reason == GATE_OK) reason = gate_ambient(state);
    if (reason == GATE_OK) reason = x != NULL ? gate_input(state, x, &plan, &view) : gate_factors(state, &plan);
    if (reason == GATE_FACTOR_VIEW || reason == GATE_INPUT_VIEW) {
        PyObject *text = PyUnicode_FromFormat("%s %s", reason_text(reason), view_status_text(plan.status));
        if (text != NULL) result = Py_BuildValue("(ssN)", reason_path(reason), reason_name(reason), text);
    } else {
        result = Py_BuildValue("(sss)", reason_path(reason), reason_name(reason), reason_text(reason));
    }
    gate_release(&plan);
    return result;
}

static PyObject *gate_info(PyObject *module, PyObject *unused) {
    PyObject *all = PyList_New(0);
    (void)unused;
    for (int i = 0; all != NULL && pk_isa_list(i) != NULL; i++) {
        PyObject *name = PyUnicode_FromString(pk_isa_list(i));
        if (name == NULL || PyList_Append(all, name) < 0) Py_CLEAR(all);
        Py_XDECREF(name);
    }
    if (all == NULL) return NULL;
    return Py_BuildValue("{s:s,s:N,s:i}", "isa", pk_isa_name(), "isas", all, "threads",
                         torch_shim_threads(&state_of(module)->torch));
}

static PyObject *gate_is_fast(PyObject *module, PyObject *unused) {
    (void)unused;
    return PyBool_FromLong(state_of(module)->fast);
}

static PyObject *gate_set_fast(PyObject *module, PyObject *value) {
    module_state *state = state_of(module);
    const bool before = state->fast;
    const int yes = PyObject_IsTrue(value);
    if (yes < 0) return NULL;
    state->fast = yes != 0;
    return PyBool_FromLong(before);
}

int gate_init(PyObject *module, module_state *state) {
    const char *fast = getenv("PEFT_C_FAST"), *isa = getenv("PEFT_C_ISA");
    (void)module;
    state->fast = fast == NULL || strcmp(fast, "0") != 0;
    if (isa != NULL && *isa != '\0' && pk_isa_select(isa) != 0) {
        PyErr_Format(PyExc_ImportError,
                     "PEFT_C_ISA=%s is no instruction set that this machine can run; the best one is %s", isa,
                     pk_isa_list(0));
        return -1;
    }
    return 0;
}

PyMethodDef gate_methods[] = {
    {"gate", gate_gate, METH_VARARGS,
     "gate(layer, x=None)\n--\n\n"
     "(path, name, reason): the path that a forward of this layer takes now, and why. path is \"C\", \"composed\", "
     "\"merged\",\n"
     "\"disabled\" or \"base\"."},
    {"info", gate_info, METH_NOARGS,
     "info()\n--\n\nThe instruction set in use (isa), those that this machine can run (isas), and torch's threads."},
    {"is_fast", gate_is_fast, METH_NOARGS, "is_fast()\n--\n\nMay C act where it can?"},
    {"set_fast", gate_set_fast, METH_O, "set_fast(enabled)\n--\n\nSet the process-wide switch; returns what it was."},
    {NULL, NULL, 0, NULL},
};
