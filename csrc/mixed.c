/* mixed.c: segments of rows, each through the kernels of its adapter. */
#include "mixed.h"

#include <stdlib.h>

/* Rows begin..end - 1 of the batch; without a factor when the layer has no such adapter. */
typedef struct {
    Py_ssize_t begin, end;
    bool adapted;
    pk_lowrank factor;
} segment;

/* The factor of one adapter as it is now. 1, 0: the composed path has to run. `adapted` false: not on this layer. */
static int segment_factor(const module_state *state, PyObject *layer, PyObject *name, PyObject *x, segment *out) {
    gate_plan plan;
    TensorView view;
    gate_reason reason = gate_adapter(state, layer, name, &plan);
    int ok = 0;
    out->adapted = reason != GATE_NO_ADAPTER;
    if (reason == GATE_NO_ADAPTER) {
        ok = 1;
    } else if (reason == GATE_OK && gate_input(state, x, &plan, &view) == GATE_OK) {
        ok = plan.terms[0].dropout == NULL && !forward_wants_graph(state, &plan, x) &&
             forward_factor(state, &plan.terms[0], &out->factor);
    }
    gate_release(&plan); /* the layer keeps the weights */
    return ok;
}

/* Splits the names into runs. Their number, or -1: the composed path has to run. */
static Py_ssize_t segments_find(const module_state *state, PyObject *layer, PyObject *x, PyObject *names,
                                segment *out) {
    const Py_ssize_t rows = PyList_Size(names);
    Py_ssize_t count = 0;
    for (Py_ssize_t i = 0; i < rows; i++) {
        PyObject *name = PyList_GetItem(names, i);
        if (!PyUnicode_Check(name)) return -1;
        if (count > 0) {
            const int same = PyUnicode_Compare(name, PyList_GetItem(names, out[count - 1].begin));
            if (same == -1 && PyErr_Occurred()) {
                PyErr_Clear();
                return -1;
            }
            if (same == 0) {
                out[count - 1].end = i + 1;
                continue;
            }
        }
        out[count].begin = i;
        out[count].end = i + 1;
        if (!segment_factor(state, layer, name, x, &out[count])) return -1;
        count++;
    }
    return count;
}

/* Batch rows begin..end - 1 of a matrix that has `inner` rows for each of them. */
static pk_mat rows_between(pk_mat all, Py_ssize_t begin, Py_ssize_t end, int64_t inner) {
    all.data = (char *)all.data + begin * inner * all.rs * pk_dtype_size(all.dtype);
    all.rows = (end - begin) * inner;
    return all;
}

/* 1 written, 0 nothing written, -1 with an exception. */
static int run(const module_state *state, PyObject *layer, PyObject *x, PyObject *y, PyObject *names, segment *parts) {
    const Py_ssize_t rows = PyList_Size(names);
    TensorView vx, vy;
    pk_mat mx, my;
    Py_ssize_t count;
    int64_t inner;
    if (!state->fast || gate_ambient(state) != GATE_OK || !view_is_plain(state, x) || !view_is_plain(state, y))
        return 0;
    if (view_peek(state, x, &vx) != VIEW_OK || view_peek(state, y, &vy) != VIEW_OK || vx.ndim < 2) return 0;
    if (vx.ndim != vy.ndim || vx.shape[0] != rows || vx.numel == 0 || vy.numel == 0) return 0;
    for (int i = 0; i < vx.ndim - 1; i++) {
        if (vx.shape[i] != vy.shape[i]) return 0;
    }
    if (view_writable(&vy) != VIEW_OK || view_may_overlap(&vx, &vy)) return 0;
    if (!view_as_rows(&vx, &mx) || !view_as_rows(&vy, &my)) return 0;
    if ((count = segments_find(state, layer, x, names, parts)) < 0) return 0;
    for (Py_ssize_t i = 0; i < count; i++) {
        if (parts[i].adapted && parts[i].factor.up.rows != my.cols) return 0;
    }
    inner = mx.rows / rows;
    for (Py_ssize_t i = 0; i < count; i++) {
        forward_product p;
        if (!parts[i].adapted) continue;
        p.x = rows_between(mx, parts[i].begin, parts[i].end, inner);
        p.y = rows_between(my, parts[i].begin, parts[i].end, inner);
        p.t.data = p.weight.data = NULL;
        p.factors[0] = parts[i].factor;
        p.count = 1;
        if (forward_run(state, &p) < 0) return -1;
    }
    return 1;
}

static PyObject *mixed_lowrank(PyObject *module, PyObject *args) {
    const module_state *state = state_of(module);
    PyObject *layer, *x, *y, *names;
    segment *parts;
    int rc;
    if (!PyArg_ParseTuple(args, "OOOO!:lowrank_mixed", &layer, &x, &y, &PyList_Type, &names)) return NULL;
    if ((parts = calloc((size_t)PyList_Size(names) + 1, sizeof *parts)) == NULL) return PyErr_NoMemory();
    rc = run(state, layer, x, y, names, parts);
    free(parts);
    return rc < 0 ? NULL : PyBool_FromLong(rc);
}

PyMethodDef mixed_methods[] = {
    {"lowrank_mixed", mixed_lowrank, METH_VARARGS,
     "lowrank_mixed(layer, x, y, names)\n--\n\n"
     "y[i] += the low-rank term of adapter names[i] for x[i], in place, for all rows i whose adapter the layer has. "
     "False when\nthe composed path has to run; then nothing was written."},
    {NULL, NULL, 0, NULL},
};
