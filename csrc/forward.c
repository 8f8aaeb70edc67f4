/* forward.c: y = base(x) + sum_i s_i (x A_i^T) B_i^T for a layer. */
#include "forward.h"

#include <string.h>

static bool wants_grad(const module_state *state, PyObject *tensor) {
    PyObject *flag = PyObject_GetAttr(tensor, state->names.requires_grad);
    const bool yes = flag != Py_False;
    if (flag == NULL) PyErr_Clear();
    Py_XDECREF(flag);
    return yes;
}

bool forward_wants_graph(const module_state *state, const gate_plan *plan, PyObject *x) {
    if (!state->torch.aoti_torch_grad_mode_is_enabled()) return false;
    if (wants_grad(state, x)) return true;
    for (int i = 0; i < plan->count; i++) {
        if (wants_grad(state, plan->terms[i].down) || wants_grad(state, plan->terms[i].up)) return true;
    }
    return false;
}

static bool plan_drops(const gate_plan *plan) {
    for (int i = 0; i < plan->count; i++) {
        if (plan->terms[i].dropout != NULL) return true;
    }
    return false;
}

/* How _finish of peft_c/fast.py is to add the terms. */
enum { FINISH_COMPOSED = 0, FINISH_COPY = 1, FINISH_IN_PLACE = 2 };

/* peft_c.fast's function of that name, imported when first needed; borrowed from *kept. */
static PyObject *fast_function(PyObject **kept, const char *name) {
    PyObject *fast = *kept == NULL ? PyImport_ImportModule("peft_c.fast") : NULL;
    PyObject *function = fast ? PyObject_GetAttrString(fast, name) : NULL;
    Py_XDECREF(fast);
    if (*kept == NULL)
        *kept = function;
    else
        Py_XDECREF(function);
    return *kept;
}

/* A tuple of (A, B, scale, dropout or None, keep) for each term. New reference. */
static PyObject *plan_tuples(const gate_plan *plan) {
    PyObject *terms = PyTuple_New(plan->count);
    for (int i = 0; terms != NULL && i < plan->count; i++) {
        const gate_term *term = &plan->terms[i];
        PyObject *item = Py_BuildValue("(OOdOd)", term->down, term->up, term->scale,
                                       term->dropout ? term->dropout : Py_None, term->keep);
        if (item == NULL || PyTuple_SetItem(terms, i, item) < 0) Py_CLEAR(terms);
    }
    return terms;
}

/* fast._finish(y, x, how, terms): the part of a forward that needs the graph, dropout or plain torch. New reference.
 */
static PyObject *finish(module_state *state, const gate_plan *plan, PyObject *x, PyObject *y, int how) {
    PyObject *function = fast_function(&state->finish, "_finish"), *terms = plan_tuples(plan), *result = NULL;
    PyObject *mode = PyLong_FromLong(how);
    if (function != NULL && terms != NULL && mode != NULL)
        result = PyObject_CallFunctionObjArgs(function, y, x, mode, terms, NULL);
    Py_XDECREF(terms);
    Py_XDECREF(mode);
    return result;
}

/* Does base(x) have the shape and layout that the terms are added to? Fills y's view. */
static bool output_fits(const module_state *state, const gate_plan *plan, PyObject *x, PyObject *y, TensorView *vy) {
    TensorView vx, vb;
    if (!view_is_plain(state, y) || view_peek(state, y, vy) != VIEW_OK || view_again(state, x, &vx) != VIEW_OK)
        return false;
    if (vy->ndim != vx.ndim || memcmp(vy->shape, vx.shape, sizeof vx.shape[0] * (size_t)(vx.ndim - 1)) != 0)
        return false;
    for (int i = 0; i < plan->count; i++) {
        if (view_again(state, plan->terms[i].up, &vb) != VIEW_OK || vb.ndim != 2) return false;
        if (vb.shape[0] != vy->shape[vy->ndim - 1]) return false;
    }
    return true;
}

/* May the terms be written into y? Only when y is fresh memory of an untouched nn.Linear that nobody else can hold. */
static bool output_is_ours(const module_state *state, const gate_plan *plan, PyObject *x, PyObject *y,
                           const TensorView *vy) {
    TensorView vx;
    pk_mat rows;
    return plan->base_is_plain && y != x && Py_REFCNT(y) == 1 && view_writable(vy) == VIEW_OK &&
           view_as_rows(vy, &rows) && view_again(state, x, &vx) == VIEW_OK && !view_may_overlap(vy, &vx);
}

/* x and the plan's factors into the product; false when one of them has no view. */
static bool product_find(const module_state *state, const gate_plan *plan, PyObject *x, forward_product *p,
                         PyObject **copy) {
    memset(p, 0, offsetof(forward_product, factors)); /* FORWARD_ADD */
    p->count = plan->count;
    if (!forward_rows(state, x, &p->x, copy)) return false;
    for (int i = 0; i < p->count; i++) {
        if (!forward_factor(state, &plan->terms[i], &p->factors[i]) || p->factors[i].down.cols != p->x.cols)
            return false;
    }
    return true;
}

/* out += terms, no graph. 1 done, 0 a tensor has no view (nothing written), -1 with an exception. */
static int add_raw(const module_state *state, const gate_plan *plan, PyObject *x, PyObject *out) {
    PyObject *copy = NULL;
    forward_product p;
    int rc = 0;
    if (product_find(state, plan, x, &p, &copy) && forward_rows(state, out, &p.y, NULL))
        rc = forward_run(state, &p) < 0 ? -1 : 1;
    Py_XDECREF(copy);
    return rc;
}

/* Base layer and terms in new memory, no graph. New reference; Py_None, borrowed, where that is not the way to do it. */
static PyObject *whole_layer(const module_state *state, const gate_plan *plan, PyObject *x) {
    PyObject *copy = NULL, *y = Py_None;
    forward_product p;
    if (product_find(state, plan, x, &p, &copy)) y = forward_layer(state, x, plan->weight, plan->bias, &p);
    Py_XDECREF(copy);
    return y;
}

/* base(x) + terms; takes over the reference to y. New reference or NULL. */
static PyObject *add_terms(module_state *state, const gate_plan *plan, PyObject *x, PyObject *y) {
    PyObject *result = NULL;
    TensorView vy;
    bool ours;
    int rc;
    if (!output_fits(state, plan, x, y, &vy)) {
        result = finish(state, plan, x, y, FINISH_COMPOSED);
        goto done;
    }
    ours = output_is_ours(state, plan, x, y, &vy);
    if (plan_drops(plan) || forward_wants_graph(state, plan, x)) {
        result = finish(state, plan, x, y, ours ? FINISH_IN_PLACE : FINISH_COPY);
        goto done;
    }
    if (ours) {
        Py_INCREF(y);
        result = y;
    } else if ((result = PyObject_CallMethodObjArgs(y, state->names.clone, NULL)) == NULL) {
        goto done;
    }
    rc = add_raw(state, plan, x, result);
    if (rc < 0) Py_CLEAR(result);
    if (rc == 0) {
        Py_DECREF(result);
        result = finish(state, plan, x, y, FINISH_COMPOSED);
    }
done:
    Py_DECREF(y);
    return result;
}

/* base(x, *args, **kwargs). New reference or NULL. */
static PyObject *call_base(const gate_plan *plan, PyObject *x, PyObject *args, PyObject *kwargs) {
    PyObject *all, *result;
    const Py_ssize_t extra = args != NULL ? PyTuple_Size(args) : 0;
    if (extra < 0) return NULL;
    if (kwargs != NULL && PyDict_Size(kwargs) == 0) kwargs = NULL;
    if (extra == 0 && kwargs == NULL) return PyObject_CallFunctionObjArgs(plan->base, x, NULL);
    if ((all = PyTuple_New(extra + 1)) == NULL) return NULL;
    Py_INCREF(x);
    PyTuple_SetItem(all, 0, x);
    for (Py_ssize_t i = 0; i < extra; i++) {
        PyObject *item = PyTuple_GetItem(args, i);
        Py_INCREF(item);
        PyTuple_SetItem(all, i + 1, item);
    }
    result = PyObject_Call(plan->base, all, kwargs);
    Py_DECREF(all);
    return result;
}

/* Has the base layer's product no gradient of its own? */
static bool linear_is_frozen(const module_state *state, const gate_plan *plan) {
    if (!view_is_plain(state, plan->weight)) return false;
    if (plan->bias != Py_None && !view_is_plain(state, plan->bias)) return false;
    if (!state->torch.aoti_torch_grad_mode_is_enabled()) return true;
    return !wants_grad(state, plan->weight) && (plan->bias == Py_None || !wants_grad(state, plan->bias));
}

/* Do the terms have the base layer's number of outputs? */
static bool linear_fits(const module_state *state, const gate_plan *plan) {
    TensorView weight, up;
    if (view_peek(state, plan->weight, &weight) != VIEW_OK || weight.ndim != 2) return false;
    for (int i = 0; i < plan->count; i++) {
        if (view_again(state, plan->terms[i].up, &up) != VIEW_OK || up.shape[0] != weight.shape[0]) return false;
    }
    return true;
}

/* fast._linear(None, x, weight, bias, scales, !base_bits, A_0, B_0, ...): base layer and terms as one node. New
 * reference. */
static PyObject *graph_linear(module_state *state, const gate_plan *plan, PyObject *x) {
    PyObject *function = fast_function(&state->linear, "_linear"), *scales = PyTuple_New(plan->count);
    PyObject *args = PyTuple_New(6 + 2 * plan->count), *result = NULL;
    PyObject *const head[] = {Py_None, x, plan->weight, plan->bias, scales, plan->base_bits ? Py_False : Py_True};
    if (function == NULL || scales == NULL || args == NULL) goto done;
    for (int i = 0; i < plan->count; i++) {
        PyObject *scale = PyFloat_FromDouble(plan->terms[i].scale);
        if (scale == NULL || PyTuple_SetItem(scales, i, scale) < 0) goto done;
        Py_INCREF(plan->terms[i].down);
        PyTuple_SetItem(args, 6 + 2 * i, plan->terms[i].down);
        Py_INCREF(plan->terms[i].up);
        PyTuple_SetItem(args, 7 + 2 * i, plan->terms[i].up);
    }
    for (int i = 0; i < 6; i++) {
        Py_INCREF(head[i]);
        PyTuple_SetItem(args, i, head[i]);
    }
    result = PyObject_Call(function, args, NULL);
done:
    Py_XDECREF(scales);
    Py_XDECREF(args);
    return result;
}

/* Does a kernel take the base layer alone for this x? */
static bool kernel_takes(const module_state *state, const gate_plan *alone, PyObject *x) {
    PyObject *copy = NULL;
    forward_product p;
    const bool yes =
        product_find(state, alone, x, &p, &copy) && forward_takes_layer(state, alone->weight, alone->bias, &p);
    Py_XDECREF(copy);
    return yes;
}

PyObject *forward_base(module_state *state, const gate_plan *plan, PyObject *x) {
    gate_plan alone = *plan;
    alone.count = 0;
    if (linear_is_frozen(state, &alone) && kernel_takes(state, &alone, x))
        return forward_wants_graph(state, &alone, x) ? graph_linear(state, &alone, x) : whole_layer(state, &alone, x);
    return PyObject_CallFunctionObjArgs(state->objects.linear, x, plan->weight, plan->bias, NULL);
}

/* The layer's output when its base is an nn.Linear and nothing but F.linear would happen in a call of it. */
static PyObject *forward_linear(module_state *state, const gate_plan *plan, PyObject *x) {
    PyObject *y;
    if (!plan_drops(plan) && linear_is_frozen(state, plan) && linear_fits(state, plan)) {
        if (forward_wants_graph(state, plan, x)) return graph_linear(state, plan, x);
        if ((y = whole_layer(state, plan, x)) != Py_None) return y;
    }
    y = forward_base(state, plan, x);
    return y != NULL ? add_terms(state, plan, x, y) : NULL;
}

PyObject *forward_planned(module_state *state, const gate_plan *plan, PyObject *x, PyObject *args, PyObject *kwargs) {
    const bool bare = (args == NULL || PyTuple_Size(args) == 0) && (kwargs == NULL || PyDict_Size(kwargs) == 0);
    PyObject *y;
    if (plan->weight != NULL && bare)
        return plan->count == 0 ? forward_base(state, plan, x) : forward_linear(state, plan, x);
    y = call_base(plan, x, args, kwargs);
    return y != NULL && plan->count > 0 ? add_terms(state, plan, x, y) : y;
}

static bool kwargs_are_special(const module_state *state, PyObject *kwargs) {
    return kwargs != NULL && PyDict_Size(kwargs) > 0 &&
           (PyDict_Contains(kwargs, state->names.adapter_names) != 0 ||
            PyDict_Contains(kwargs, state->names.alora_offsets) != 0);
}

static PyObject *forward_lowrank(PyObject *module, PyObject *const *arguments, Py_ssize_t count) {
    module_state *state = state_of(module);
    PyObject *args = count > 2 && arguments[2] != Py_None ? arguments[2] : NULL;
    PyObject *kwargs = count > 3 && arguments[3] != Py_None ? arguments[3] : NULL, *result = NULL;
    gate_plan plan;
    gate_reason reason;
    TensorView view;
    if (count < 2 || count > 4 || (args != NULL && !PyTuple_Check(args)) ||
        (kwargs != NULL && !PyDict_Check(kwargs))) {
        PyErr_SetString(PyExc_TypeError,
                        "lowrank_forward(layer, x, args=(), kwargs=None): args a tuple, kwargs a dict");
        return NULL;
    }
    if (!state->fast || kwargs_are_special(state, kwargs)) Py_RETURN_NOTIMPLEMENTED;
    reason = gate_layer(state, arguments[0], &plan);
    if (reason == GATE_OK && (reason = gate_ambient(state)) == GATE_OK) {
        reason = gate_input(state, arguments[1], &plan, &view);
        if (reason == GATE_OK) {
            result = forward_planned(state, &plan, arguments[1], args, kwargs);
            goto done;
        }
    }
    if (reason == GATE_MERGED || reason == GATE_DISABLED || reason == GATE_NO_ADAPTER) {
        result = call_base(&plan, arguments[1], args, kwargs);
    } else {
        result = Py_NewRef(Py_NotImplemented);
    }
done:
    gate_release(&plan);
    return result;
}

PyMethodDef forward_methods[] = {
    {"lowrank_forward", (PyCFunction)(void (*)(void))forward_lowrank, METH_FASTCALL,
     "lowrank_forward(layer, x, args=(), kwargs=None)\n--\n\n"
     "base_layer(x, *args, **kwargs) plus the low-rank terms of the active adapters; NotImplemented, with nothing "
     "called or\n"
     "changed, where the composed path has to run."},
    {NULL, NULL, 0, NULL},
};
