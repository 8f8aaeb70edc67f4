/* forward.c: y = base(x) + sum_i s_i (x A_i^T) B_i^T around the kernels, and its backward. */
#include "forward.h"

#include <stdlib.h>
#include <string.h>

enum {
    STACK_WORK = 8192 /* bytes of kernel workspace on the stack; more comes from the heap */
};

/* ---------------------------------------------------------------------------------------------------- kernel calls */

static int kernel_error(int rc) {
    if (rc == PK_EPARALLEL) {
        PyErr_SetString(PyExc_RuntimeError, "torch's thread pool could not run the low-rank kernel");
    } else {
        PyErr_Format(PyExc_ValueError, "the low-rank kernel refused its operands (%d): shapes do not fit", rc);
    }
    return -1;
}

static bool is_large(const pk_mat *x, const pk_mat *y, int64_t rank) {
    return (double)(x->rows + FORWARD_READING) * (double)rank * (double)(x->cols + y->cols) > (double)FORWARD_PARALLEL;
}

int forward_run(const module_state *state, const forward_product *p) {
    const size_t size = pk_lowrank_apply_work(&p->y, &p->x, p->factors, p->count);
    const pk_mat *t = p->t.data != NULL ? &p->t : NULL;
    char stack[STACK_WORK];
    void *work = size <= sizeof stack ? stack : malloc(size);
    int64_t rank = 0;
    int rc;
    if (work == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    for (int i = 0; i < p->count; i++) rank += p->factors[i].down.rows;
    if (is_large(&p->x, &p->y, rank)) {
        PyThreadState *thread = PyEval_SaveThread();
        rc = pk_lowrank_apply(&p->y, &p->x, p->factors, p->count, t, work, state->torch.torch_parallel_for);
        PyEval_RestoreThread(thread);
    } else {
        rc = pk_lowrank_apply(&p->y, &p->x, p->factors, p->count, t, work, NULL);
    }
    if (work != stack) free(work);
    return rc == PK_OK ? 0 : kernel_error(rc);
}

/* 0, or -1 with an exception. */
static int backward_run(const module_state *state, const pk_backward *q) {
    const size_t size = pk_lowrank_backward_work(q);
    char stack[STACK_WORK];
    void *work = size <= sizeof stack ? stack : malloc(size);
    int rc;
    if (work == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    if (is_large(&q->x, &q->g, q->factor.down.rows)) {
        PyThreadState *thread = PyEval_SaveThread();
        rc = pk_lowrank_backward(q, work, state->torch.torch_parallel_for);
        PyEval_RestoreThread(thread);
    } else {
        rc = pk_lowrank_backward(q, work, NULL);
    }
    if (work != stack) free(work);
    return rc == PK_OK ? 0 : kernel_error(rc);
}

/* ------------------------------------------------------------------------------------------------- tensors to rows */

/* `tensor` as rows of its last dimension. When its leading strides are not one stride, a contiguous copy is made and
 * put into *copy (owned by the caller, to be released after the kernel). False, without an exception, when it has no
 * such view. */
static bool rows_of(const module_state *state, PyObject *tensor, pk_mat *out, PyObject **copy) {
    TensorView view;
    if (view_again(state, tensor, &view) != VIEW_OK) return false;
    if (view_as_rows(&view, out)) return true;
    if (view.ndim == 0 || copy == NULL) return false;
    *copy = PyObject_CallMethodObjArgs(tensor, state->names.contiguous, NULL);
    if (*copy == NULL) {
        PyErr_Clear();
        return false;
    }
    return view_again(state, *copy, &view) == VIEW_OK && view_as_rows(&view, out);
}

static bool matrix_of(const module_state *state, PyObject *tensor, pk_mat *out) {
    TensorView view;
    return view_again(state, tensor, &view) == VIEW_OK && view.ndim == 2 && view_as_rows(&view, out);
}

/* One factor from its two weights. */
static bool factor_of(const module_state *state, PyObject *down, PyObject *up, double scale, pk_lowrank *out) {
    out->scale = scale;
    return matrix_of(state, down, &out->down) && matrix_of(state, up, &out->up) && out->down.rows == out->up.cols;
}

bool forward_factor(const module_state *state, const gate_term *term, pk_lowrank *out) {
    return factor_of(state, term->down, term->up, term->scale, out);
}

/* ----------------------------------------------------------------------------------------------------- the forward */

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

/* fast._finish(y, x, how, terms): the part of a forward that needs the graph, dropout or plain torch. New reference.
 */
static PyObject *finish(module_state *state, const gate_plan *plan, PyObject *x, PyObject *y, int how) {
    PyObject *terms = NULL, *mode = NULL, *result = NULL;
    if (state->finish == NULL) {
        PyObject *fast = PyImport_ImportModule("peft_c.fast");
        PyObject *function = fast ? PyObject_GetAttrString(fast, "_finish") : NULL;
        Py_XDECREF(fast);
        if (function == NULL) return NULL;
        if (state->finish == NULL)
            state->finish = function;
        else
            Py_DECREF(function);
    }
    terms = PyTuple_New(plan->count);
    for (int i = 0; terms != NULL && i < plan->count; i++) {
        const gate_term *term = &plan->terms[i];
        PyObject *item = Py_BuildValue("(OOdOd)", term->down, term->up, term->scale,
                                       term->dropout ? term->dropout : Py_None, term->keep);
        if (item == NULL || PyTuple_SetItem(terms, i, item) < 0) Py_CLEAR(terms);
    }
    mode = PyLong_FromLong(how);
    if (terms != NULL && mode != NULL) result = PyObject_CallFunctionObjArgs(state->finish, y, x, mode, terms, NULL);
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

/* out += terms, no graph. 1 done, 0 a tensor has no view (nothing written), -1 with an exception. */
static int add_raw(const module_state *state, const gate_plan *plan, PyObject *x, PyObject *out) {
    PyObject *copy = NULL;
    forward_product p;
    int rc = 0;
    p.count = plan->count;
    p.t.data = NULL;
    if (!rows_of(state, x, &p.x, &copy) || !rows_of(state, out, &p.y, NULL)) goto done;
    for (int i = 0; i < p.count; i++) {
        const gate_term *term = &plan->terms[i];
        const pk_lowrank *f = &p.factors[i];
        if (!forward_factor(state, term, &p.factors[i])) goto done;
        if (f->down.cols != p.x.cols || f->up.rows != p.y.cols) goto done;
    }
    rc = forward_run(state, &p) < 0 ? -1 : 1;
done:
    Py_XDECREF(copy);
    return rc;
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

/* The same when nothing but F.linear would happen: without the module's call around it. */
static PyObject *call_linear(const module_state *state, const gate_plan *plan, PyObject *x) {
    PyObject *linear = PyDict_GetItemWithError(state->objects.functional, state->names.linear);
    if (linear == NULL) return PyErr_Occurred() ? NULL : call_base(plan, x, NULL, NULL);
    return PyObject_CallFunctionObjArgs(linear, x, plan->weight, plan->bias, NULL);
}

PyObject *forward_planned(module_state *state, const gate_plan *plan, PyObject *x, PyObject *args, PyObject *kwargs) {
    const bool bare = (args == NULL || PyTuple_Size(args) == 0) && (kwargs == NULL || PyDict_Size(kwargs) == 0);
    PyObject *y = plan->weight != NULL && bare ? call_linear(state, plan, x) : call_base(plan, x, args, kwargs);
    return y != NULL ? add_terms(state, plan, x, y) : NULL;
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
        result = Py_NotImplemented;
        Py_INCREF(result);
    }
done:
    gate_release(&plan);
    return result;
}

/* ------------------------------------------------------------------------- the two halves of the autograd.Function */

/* factors = (A_0, B_0, ...), scales = (s_0, ...) into p. 1, 0 without a view, -1 with an exception. */
static int parse_factors(const module_state *state, PyObject *scales, PyObject *factors, pk_lowrank *out, int *count) {
    const Py_ssize_t n = PyTuple_Size(scales);
    if (n < 0) return -1;
    if (n > GATE_MAX_TERMS || PyTuple_Size(factors) != 2 * n) {
        PyErr_Format(PyExc_ValueError, "expected at most %d scales and two factors for each, got %zd and %zd",
                     GATE_MAX_TERMS, n, PyTuple_Size(factors));
        return -1;
    }
    for (Py_ssize_t i = 0; i < n; i++) {
        const double scale = PyFloat_AsDouble(PyTuple_GetItem(scales, i));
        if (scale == -1.0 && PyErr_Occurred()) return -1;
        if (!factor_of(state, PyTuple_GetItem(factors, 2 * i), PyTuple_GetItem(factors, 2 * i + 1), scale, &out[i]))
            return 0;
    }
    *count = (int)n;
    return 1;
}

static PyObject *forward_apply(PyObject *module, PyObject *args) {
    const module_state *state = state_of(module);
    PyObject *y, *x, *t, *scales, *factors, *copy = NULL, *result = NULL;
    TensorView view;
    forward_product p;
    int rc;
    if (!PyArg_ParseTuple(args, "OOOO!O!:lowrank_apply", &y, &x, &t, &PyTuple_Type, &scales, &PyTuple_Type, &factors))
        return NULL;
    p.t.data = NULL;
    if (view_get(state, y, "y", true, &view) < 0) return NULL;
    if ((rc = parse_factors(state, scales, factors, p.factors, &p.count)) < 0) return NULL;
    if (rc == 0 || !rows_of(state, y, &p.y, NULL) || (t != Py_None && !matrix_of(state, t, &p.t)) ||
        !rows_of(state, x, &p.x, &copy)) {
        PyErr_SetString(PyExc_ValueError,
                        "lowrank_apply: y, t and the factors must be strided CPU matrices, A (r, k), B (n, r)");
        goto done;
    }
    if (forward_run(state, &p) < 0) goto done;
    result = Py_None;
    Py_INCREF(result);
done:
    Py_XDECREF(copy);
    return result;
}

/* `tensor` as rows into `out`, or data NULL for None. */
static bool rows_or_none(const module_state *state, PyObject *tensor, pk_mat *out, PyObject **copy) {
    memset(out, 0, sizeof *out);
    return tensor == Py_None || rows_of(state, tensor, out, copy);
}

typedef struct {
    pk_mat g, x, t, dx;
    pk_lowrank factors[GATE_MAX_TERMS];
    int count;
} gradient;

/* Factor i: its own columns of t, its own outputs. 1, 0 without a view, -1 with an exception. */
static int gradient_run(const module_state *state, const gradient *all, int i, int64_t column, PyObject *grads) {
    pk_backward q;
    q.g = all->g;
    q.x = all->x;
    q.t = all->t;
    q.dx = all->dx;
    q.dx_add = i > 0;
    q.factor = all->factors[i];
    if (q.t.data != NULL) {
        q.t.data = (char *)q.t.data + column * q.t.cs * (q.t.dtype == PK_F64 ? 8 : 4);
        q.t.cols = q.factor.down.rows;
    }
    if (!rows_or_none(state, PyTuple_GetItem(grads, 2 * i), &q.da, NULL)) return 0;
    if (!rows_or_none(state, PyTuple_GetItem(grads, 2 * i + 1), &q.db, NULL)) return 0;
    if (q.dx.data == NULL && q.da.data == NULL && q.db.data == NULL) return 1;
    return backward_run(state, &q) < 0 ? -1 : 1;
}

static PyObject *forward_backward(PyObject *module, PyObject *args) {
    const module_state *state = state_of(module);
    PyObject *g, *x, *t, *scales, *factors, *dx, *grads, *g_copy = NULL, *x_copy = NULL, *result = NULL;
    gradient all;
    int64_t column = 0;
    TensorView view;
    int rc;
    if (!PyArg_ParseTuple(args, "OOOO!O!OO!:lowrank_backward", &g, &x, &t, &PyTuple_Type, &scales, &PyTuple_Type,
                          &factors, &dx, &PyTuple_Type, &grads)) {
        return NULL;
    }
    if (PyTuple_Size(grads) != PyTuple_Size(factors)) {
        PyErr_SetString(PyExc_ValueError, "lowrank_backward: grads must have one entry for each factor");
        return NULL;
    }
    if ((rc = parse_factors(state, scales, factors, all.factors, &all.count)) < 0) return NULL;
    if (rc == 0 || !view_is_plain(state, g) || view_peek(state, g, &view) != VIEW_OK ||
        !rows_of(state, g, &all.g, &g_copy) || !rows_or_none(state, x, &all.x, &x_copy) ||
        !rows_or_none(state, t, &all.t, NULL) || !rows_or_none(state, dx, &all.dx, NULL)) {
        rc = 0;
    }
    if (all.x.data == NULL && rc == 1) { /* only its shape is asked for */
        all.x.rows = all.g.rows;
        all.x.cols = all.count > 0 ? all.factors[0].down.cols : 0;
        all.x.dtype = all.g.dtype;
    }
    for (int i = 0; rc == 1 && i < all.count; i++) {
        rc = gradient_run(state, &all, i, column, grads);
        column += all.factors[i].down.rows;
    }
    if (rc >= 0) result = PyBool_FromLong(rc);
    Py_XDECREF(g_copy);
    Py_XDECREF(x_copy);
    return result;
}

PyMethodDef forward_methods[] = {
    {"lowrank_forward", (PyCFunction)(void (*)(void))forward_lowrank, METH_FASTCALL,
     "lowrank_forward(layer, x, args=(), kwargs=None)\n--\n\n"
     "base_layer(x, *args, **kwargs) plus the low-rank terms of the active adapters; NotImplemented, with nothing "
     "called or\n"
     "changed, where the composed path has to run."},
    {"lowrank_apply", forward_apply, METH_VARARGS,
     "lowrank_apply(y, x, t, scales, factors)\n--\n\n"
     "y (..., n) += sum_i scales[i] (x A_i^T) B_i^T in place; factors = (A_0, B_0, ...). t: None, or (m, sum r_i) "
     "that receives\n"
     "x A^T. Autograd does not see it."},
    {"lowrank_backward", forward_backward, METH_VARARGS,
     "lowrank_backward(g, x, t, scales, factors, dx, grads)\n--\n\n"
     "Fills dx (..., k) and grads = (dA_0, dB_0, ...), tensors or None, from g (..., n). x is needed for dA, t for "
     "dB.\n"
     "False when a tensor has no plain view; then nothing was written."},
    {NULL, NULL, 0, NULL},
};
