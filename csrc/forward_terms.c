/* forward_terms.c: the low-rank forward of a layer that computes its factors at each call. */
#include "forward.h"

/* (A, B, scale) into the plan's next term. 1: done; 0: not C's; -1: exception. */
static int plan_term(const module_state *state, PyObject *factors, gate_plan *plan) {
    gate_term *term = &plan->terms[plan->count];
    if (!PyTuple_Check(factors) || PyTuple_Size(factors) != 3) {
        PyErr_SetString(PyExc_TypeError, "terms must be (A, B, scale) tuples");
        return -1;
    }
    PyObject *down = PyTuple_GetItem(factors, 0), *up = PyTuple_GetItem(factors, 1);
    if (plan->count == GATE_MAX_TERMS || !view_is_plain(state, down) || !view_is_plain(state, up)) return 0;
    term->scale = PyFloat_AsDouble(PyTuple_GetItem(factors, 2));
    if (term->scale == -1.0 && PyErr_Occurred()) return -1;
    Py_INCREF(down);
    Py_INCREF(up);
    term->down = down;
    term->up = up;
    term->dropout = NULL;
    term->keep = 1.0;
    plan->count++;
    return 1;
}

/* Fills the plan from the layer's dict and the terms. 1: done; 0: not C's; -1: exception. */
static int plan_terms(const module_state *state, PyObject *layer, PyObject *terms, gate_plan *plan) {
    PyObject *dict = PyObject_GenericGetDict(layer, NULL), *cast;
    int got = -1;
    if (dict == NULL) return -1;
    cast = PyDict_GetItemWithError(dict, state->names.cast_input_dtype_enabled);
    if (cast == NULL && PyErr_Occurred()) goto done;
    plan->cast = cast != Py_False;
    got = gate_base(state, dict, plan) == GATE_OK;
    for (Py_ssize_t i = 0; got == 1 && i < PyList_Size(terms); i++) {
        got = plan_term(state, PyList_GetItem(terms, i), plan);
    }
done:
    Py_DECREF(dict);
    return got;
}

static PyObject *forward_terms(PyObject *module, PyObject *const *arguments, Py_ssize_t count) {
    module_state *state = state_of(module);
    gate_plan plan = {.base = NULL};
    PyObject *result = NULL;
    TensorView view;
    if (count != 5 || !PyList_Check(arguments[2]) || !PyTuple_Check(arguments[3]) || !PyDict_Check(arguments[4])) {
        PyErr_SetString(PyExc_TypeError, "lowrank_terms(layer, x, terms, args, kwargs): a list, a tuple, a dict");
        return NULL;
    }
    const int got = gate_ambient(state) == GATE_OK ? plan_terms(state, arguments[0], arguments[2], &plan) : 0;
    if (got < 0) goto done;
    if (got == 1 && gate_input(state, arguments[1], &plan, &view) == GATE_OK) {
        plan.base_bits = view.dtype == PK_F32 || view.dtype == PK_F64; /* see room.py: base_output */
        result = forward_planned(state, &plan, arguments[1], arguments[3], arguments[4]);
    } else {
        result = Py_NewRef(Py_NotImplemented);
    }
done:
    gate_release(&plan);
    return result;
}

static PyObject *forward_may_act(PyObject *module, PyObject *unused) {
    (void)unused;
    return PyBool_FromLong(gate_ambient(state_of(module)) == GATE_OK);
}

PyMethodDef terms_methods[] = {
    {"lowrank_terms", (PyCFunction)(void (*)(void))forward_terms, METH_FASTCALL,
     "lowrank_terms(layer, x, terms, args, kwargs)\n--\n\n"
     "layer.base_layer(x, *args, **kwargs) plus scale * B(A(x)) for each of the terms (A, B, scale); NotImplemented, "
     "with\nnothing called, where C may not act."},
    {"may_act", forward_may_act, METH_NOARGS,
     "may_act()\n--\n\nMay C act here and now, whatever the layer: the switch, modes, autocast, hooks of all "
     "modules."},
    {NULL, NULL, 0, NULL},
};
