/* forward_raw.c: tensors to the low-rank kernels, and the two halves of the autograd.Function. */
#include "forward_raw.h"

#include <stdlib.h>
#include <string.h>

enum {
    MANY_ROWS = 64,   /* from which on F.linear takes much longer than the calls around it */
    STACK_WORK = 8192 /* bytes of kernel workspace on the stack; more comes from the heap */
};

/* ---------------------------------------------------------------------------------------------------- kernel calls */

int forward_error(int rc) {
    if (rc == PK_EPARALLEL) {
        PyErr_SetString(PyExc_RuntimeError, "torch's thread pool could not run the low-rank kernel");
    } else {
        PyErr_Format(PyExc_ValueError, "the low-rank kernel refused its operands (%d): shapes do not fit", rc);
    }
    return -1;
}

static bool is_large(const pk_mat *x, const pk_mat *y, int64_t rank, bool whole) {
    const double each = (double)rank * (double)(x->cols + y->cols) + (whole ? (double)x->cols * (double)y->cols : 0.0);
    return (double)(x->rows + FORWARD_READING) * each > (double)FORWARD_PARALLEL;
}

static int kernel_run(const forward_product *p, void *work, pk_parallel_fn parallel) {
    const pk_mat *t = p->t.data != NULL ? &p->t : NULL;
    if (p->kind == FORWARD_LAYER)
        return pk_linear(&p->y, &p->x, &p->weight, &p->bias, p->factors, p->count, t, work, parallel);
    return (p->kind == FORWARD_SET ? pk_lowrank_set : pk_lowrank_apply)(&p->y, &p->x, p->factors, p->count, t, work,
                                                                        parallel);
}

int forward_run(const module_state *state, const forward_product *p) {
    const bool whole = p->kind == FORWARD_LAYER;
    const size_t size = whole ? pk_linear_work(&p->y, &p->x, &p->weight, p->factors, p->count)
                              : pk_lowrank_apply_work(&p->y, &p->x, p->factors, p->count);
    char stack[STACK_WORK];
    void *work = size <= sizeof stack ? stack : malloc(size);
    int64_t rank = 0;
    int rc;
    if (work == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    for (int i = 0; i < p->count; i++) rank += p->factors[i].down.rows;
    if (is_large(&p->x, &p->y, rank, whole)) {
        PyThreadState *thread = PyEval_SaveThread();
        rc = kernel_run(p, work, state->torch.torch_parallel_for);
        PyEval_RestoreThread(thread);
    } else {
        rc = kernel_run(p, work, NULL);
    }
    if (work != stack) free(work);
    return rc == PK_OK ? 0 : forward_error(rc);
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
    if (is_large(&q->x, &q->g, q->factor.down.rows, false)) {
        PyThreadState *thread = PyEval_SaveThread();
        rc = pk_lowrank_backward(q, work, state->torch.torch_parallel_for);
        PyEval_RestoreThread(thread);
    } else {
        rc = pk_lowrank_backward(q, work, NULL);
    }
    if (work != stack) free(work);
    return rc == PK_OK ? 0 : forward_error(rc);
}

/* ------------------------------------------------------------------------------------------------- tensors to rows */

bool forward_rows(const module_state *state, PyObject *tensor, pk_mat *out, PyObject **copy) {
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

/* ----------------------------------------------------------------------------------------------- the whole layer */

bool forward_takes_layer(const module_state *state, PyObject *weight, PyObject *bias, forward_product *p) {
    TensorView view;
    pk_mat w;
    p->bias.data = NULL;
    if (!view_is_plain(state, weight) || view_peek(state, weight, &view) != VIEW_OK || view.ndim != 2) return false;
    if (!view_as_rows(&view, &w) || w.dtype != p->x.dtype || w.cols != p->x.cols || (w.cs != 1 && w.cols > 1))
        return false;
    if (!pk_linear_suits(w.dtype, p->x.rows, w.rows, w.cols)) return false;
    if (bias != Py_None) {
        if (!view_is_plain(state, bias) || view_peek(state, bias, &view) != VIEW_OK || view.ndim != 1) return false;
        if (!view_as_rows(&view, &p->bias) || p->bias.cols != w.rows || p->bias.dtype != w.dtype) return false;
    }
    p->weight = w;
    p->kind = FORWARD_LAYER;
    return true;
}

/* An uninitialised tensor like x, of n columns. New reference, or NULL with an exception. */
static PyObject *empty_like(const module_state *state, PyObject *x, int64_t n) {
    TensorView view;
    PyObject *shape, *result = NULL;
    if (view_again(state, x, &view) != VIEW_OK || view.ndim == 0) {
        PyErr_SetString(PyExc_ValueError, "the input must be a strided CPU tensor of one dimension or more");
        return NULL;
    }
    shape = PyTuple_New(view.ndim);
    for (int i = 0; shape != NULL && i < view.ndim; i++) {
        PyObject *size = PyLong_FromLongLong(i == view.ndim - 1 ? n : view.shape[i]);
        if (size == NULL || PyTuple_SetItem(shape, i, size) < 0) Py_CLEAR(shape);
    }
    if (shape != NULL) result = PyObject_CallMethodObjArgs(x, state->names.new_empty, shape, NULL);
    Py_XDECREF(shape);
    return result;
}

/* The terms, then the layer's product on top of them in the GEMM's own sum: y is read once less. y.addmm_(x, w^T).
 * Milliseconds, f32, for four weights of 1024 x 1024, two of 2816 x 1024 and one of 1024 x 2816; 2 threads of Zen 4:
 *                       128 rows   512 rows
 *   F.linear alone       20.8       75.8
 *   terms added after    21.5       78.7
 *   terms before         21.3       77.7
 * In bf16 it is slower, and a bias would have to be added by itself. */
static bool terms_come_first(const module_state *state, PyObject *weight, PyObject *bias, const forward_product *p) {
    TensorView w;
    return bias == Py_None && p->count > 0 && p->x.dtype == PK_F32 && p->x.rows > MANY_ROWS &&
           view_is_plain(state, weight) && view_peek(state, weight, &w) == VIEW_OK && w.ndim == 2 &&
           w.dtype == PK_F32 && w.shape[0] == p->factors[0].up.rows && w.shape[1] == p->x.cols && p->x.cols > 0;
}

/* y += x weight^T; 0, or -1 with an exception. */
static int add_linear(PyObject *y, PyObject *x, PyObject *weight) {
    PyObject *rows = PyObject_CallMethod(y, "flatten", "ii", 0, -2),
             *inputs = PyObject_CallMethod(x, "flatten", "ii", 0, -2);
    PyObject *turned = PyObject_CallMethod(weight, "t", NULL), *done = NULL;
    if (rows != NULL && inputs != NULL && turned != NULL)
        done = PyObject_CallMethod(rows, "addmm_", "OO", inputs, turned);
    Py_XDECREF(rows);
    Py_XDECREF(inputs);
    Py_XDECREF(turned);
    Py_XDECREF(done);
    return done != NULL ? 0 : -1;
}

PyObject *forward_layer(const module_state *state, PyObject *x, PyObject *weight, PyObject *bias, forward_product *p) {
    PyObject *y;
    if (!forward_takes_layer(state, weight, bias, p)) {
        if (!terms_come_first(state, weight, bias, p)) return Py_None;
        p->kind = FORWARD_SET;
    }
    y = empty_like(state, x, p->kind == FORWARD_LAYER ? p->weight.rows : p->factors[0].up.rows);
    if (y == NULL) return NULL;
    if (!forward_rows(state, y, &p->y, NULL)) {
        PyErr_SetString(PyExc_RuntimeError, "new_empty gave no plain tensor");
        Py_CLEAR(y);
    } else if (forward_run(state, p) < 0 || (p->kind == FORWARD_SET && add_linear(y, x, weight) < 0)) {
        Py_CLEAR(y);
    }
    return y;
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
    p.kind = FORWARD_ADD;
    if (view_get(state, y, "y", true, &view) < 0) return NULL;
    if ((rc = parse_factors(state, scales, factors, p.factors, &p.count)) < 0) return NULL;
    if (rc == 0 || !forward_rows(state, y, &p.y, NULL) || (t != Py_None && !matrix_of(state, t, &p.t)) ||
        !forward_rows(state, x, &p.x, &copy)) {
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

static PyObject *forward_linear(PyObject *module, PyObject *args) {
    const module_state *state = state_of(module);
    PyObject *x, *weight, *bias, *t, *scales, *factors, *copy = NULL, *y = NULL;
    forward_product p;
    int rc;
    if (!PyArg_ParseTuple(args, "OOOOO!O!:lowrank_linear", &x, &weight, &bias, &t, &PyTuple_Type, &scales,
                          &PyTuple_Type, &factors))
        return NULL;
    p.t.data = NULL;
    if ((rc = parse_factors(state, scales, factors, p.factors, &p.count)) < 0) return NULL;
    if (rc == 0 || (t != Py_None && !matrix_of(state, t, &p.t)) || !forward_rows(state, x, &p.x, &copy)) {
        PyErr_SetString(PyExc_ValueError,
                        "lowrank_linear: x, t and the factors must be strided CPU matrices, A (r, k), B (n, r)");
        goto done;
    }
    if ((y = forward_layer(state, x, weight, bias, &p)) != Py_None) goto done;
    y = PyObject_CallFunctionObjArgs(state->objects.linear, x, weight, bias, NULL);
    p.kind = FORWARD_ADD;
    if (y != NULL && !forward_rows(state, y, &p.y, NULL)) {
        PyErr_SetString(PyExc_ValueError, "lowrank_linear: the layer's output is no strided CPU tensor");
        Py_CLEAR(y);
    }
    if (y != NULL && forward_run(state, &p) < 0) Py_CLEAR(y);
done:
    Py_XDECREF(copy);
    return y;
}

/* `tensor` as rows into `out`, or data NULL for None. */
static bool rows_or_none(const module_state *state, PyObject *tensor, pk_mat *out, PyObject **copy) {
    memset(out, 0, sizeof *out);
    return tensor == Py_None || forward_rows(state, tensor, out, copy);
}

static pk_mat turned(pk_mat a) {
    const pk_mat t = {a.data, a.cols, a.rows, a.cs, a.rs, a.dtype};
    return t;
}

/* g, the weight and the factors into the product of the gradient, if a kernel is the one to take it. */
static bool grad_find(const module_state *state, PyObject *g, PyObject *weight, PyObject *u, forward_product *p,
                      PyObject **copy) {
    TensorView view;
    pk_mat w;
    if (!view_is_plain(state, g) || view_peek(state, g, &view) != VIEW_OK ||
        view_peek(state, weight, &view) != VIEW_OK || !matrix_of(state, weight, &w) || w.cs != 1 ||
        !rows_or_none(state, u, &p->t, NULL) || !forward_rows(state, g, &p->x, copy))
        return false;
    if (p->x.dtype != w.dtype || p->x.cols != w.rows || !pk_linear_grad_suits(w.dtype, p->x.rows, w.rows, w.cols))
        return false;
    p->kind = FORWARD_LAYER;
    p->weight = turned(w);
    p->bias.data = NULL;
    for (int i = 0; i < p->count; i++) {
        pk_lowrank *f = &p->factors[i];
        const pk_mat up = turned(f->down);
        f->down = turned(f->up);
        f->up = up;
        if (f->down.cols != w.rows || f->up.rows != w.cols) return false;
    }
    return true;
}

static PyObject *forward_linear_grad(PyObject *module, PyObject *args) {
    const module_state *state = state_of(module);
    PyObject *g, *weight, *u = Py_None, *scales = NULL, *factors = NULL, *dx = NULL, *copy = NULL;
    forward_product p = {.count = 0};
    int rc = 1;
    if (!PyArg_ParseTuple(args, "OO|OO!O!:linear_grad", &g, &weight, &u, &PyTuple_Type, &scales, &PyTuple_Type,
                          &factors))
        return NULL;
    if (factors != NULL && (rc = parse_factors(state, scales, factors, p.factors, &p.count)) < 0) return NULL;
    if (rc == 0 || !grad_find(state, g, weight, u, &p, &copy)) {
        dx = Py_NewRef(Py_None);
    } else if ((dx = empty_like(state, g, p.weight.rows)) != NULL &&
               (!forward_rows(state, dx, &p.y, NULL) || forward_run(state, &p) < 0)) {
        if (!PyErr_Occurred()) PyErr_SetString(PyExc_RuntimeError, "new_empty gave no plain tensor");
        Py_CLEAR(dx);
    }
    Py_XDECREF(copy);
    return dx;
}

typedef struct {
    pk_mat g, x, t, u, dx;
    pk_lowrank factors[GATE_MAX_TERMS];
    int count, dx_add;
} gradient;

/* r columns of t or u from the given one on */
static pk_mat columns_of(pk_mat a, int64_t column, int64_t r) {
    if (a.data != NULL) {
        a.data = (char *)a.data + column * a.cs * pk_dtype_size(a.dtype);
        a.cols = r;
    }
    return a;
}

/* Factor i: its own columns of t and u, its own outputs. 1, 0 without a view, -1 with an exception. */
static int gradient_run(const module_state *state, const gradient *all, int i, int64_t column, PyObject *grads) {
    pk_backward q;
    q.g = all->g;
    q.x = all->x;
    q.dx = all->dx;
    q.dx_add = i > 0 || all->dx_add;
    q.factor = all->factors[i];
    q.t = columns_of(all->t, column, q.factor.down.rows);
    q.u = columns_of(all->u, column, q.factor.down.rows);
    if (!rows_or_none(state, PyTuple_GetItem(grads, 2 * i), &q.da, NULL)) return 0;
    if (!rows_or_none(state, PyTuple_GetItem(grads, 2 * i + 1), &q.db, NULL)) return 0;
    if (q.dx.data == NULL && q.da.data == NULL && q.db.data == NULL) return 1;
    return backward_run(state, &q) < 0 ? -1 : 1;
}

static PyObject *forward_backward(PyObject *module, PyObject *args) {
    const module_state *state = state_of(module);
    PyObject *g, *x, *t, *u = Py_None, *scales, *factors, *dx, *grads, *g_copy = NULL, *x_copy = NULL, *result = NULL;
    gradient all;
    int64_t column = 0;
    TensorView view;
    int rc;
    all.dx_add = 0;
    if (!PyArg_ParseTuple(args, "OOOO!O!OO!|pO:lowrank_backward", &g, &x, &t, &PyTuple_Type, &scales, &PyTuple_Type,
                          &factors, &dx, &PyTuple_Type, &grads, &all.dx_add, &u)) {
        return NULL;
    }
    if (PyTuple_Size(grads) != PyTuple_Size(factors)) {
        PyErr_SetString(PyExc_ValueError, "lowrank_backward: grads must have one entry for each factor");
        return NULL;
    }
    if ((rc = parse_factors(state, scales, factors, all.factors, &all.count)) < 0) return NULL;
    if (rc == 0 || !view_is_plain(state, g) || view_peek(state, g, &view) != VIEW_OK ||
        !forward_rows(state, g, &all.g, &g_copy) || !rows_or_none(state, x, &all.x, &x_copy) ||
        !rows_or_none(state, t, &all.t, NULL) || !rows_or_none(state, u, &all.u, NULL) ||
        !rows_or_none(state, dx, &all.dx, NULL)) {
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

PyMethodDef forward_raw_methods[] = {
    {"lowrank_apply", forward_apply, METH_VARARGS,
     "lowrank_apply(y, x, t, scales, factors)\n--\n\n"
     "y (..., n) += sum_i scales[i] (x A_i^T) B_i^T in place; factors = (A_0, B_0, ...). t: None, or (m, sum r_i) "
     "that receives\n"
     "x A^T. Autograd does not see it."},
    {"lowrank_linear", forward_linear, METH_VARARGS,
     "lowrank_linear(x, weight, bias, t, scales, factors)\n--\n\n"
     "F.linear(x, weight, bias) plus these terms (see lowrank_apply) as a new tensor. Autograd does not see it."},
    {"linear_grad", forward_linear_grad, METH_VARARGS,
     "linear_grad(g, weight, u=None, scales=(), factors=())\n--\n\n"
     "g @ weight + sum_i scales[i] (g B_i) A_i where that is faster here than in torch, else None.\n"
     "u: None, or (m, sum r_i) that receives g B. Autograd does not see it."},
    {"lowrank_backward", forward_backward, METH_VARARGS,
     "lowrank_backward(g, x, t, scales, factors, dx, grads, add=False, u=None)\n--\n\n"
     "Fills dx (..., k), or adds to it, and grads = (dA_0, dB_0, ...), tensors or None, from g (..., n).\n"
     "x is needed for dA, t for dB; u, if it is known, spares g B where dx is None.\n"
     "False when a tensor has no plain view; then nothing was written."},
    {NULL, NULL, 0, NULL},
};
