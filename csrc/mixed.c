/* mixed.c: segments of rows, each through the kernels of its adapter. */
#include "mixed.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

/* An adapter of the batch. */
typedef struct {
    PyObject *name;      /* borrowed from the names */
    PyObject *down, *up; /* owned; NULL when the layer has no such adapter */
    pk_lowrank factor;
} slot;

/* Rows begin..end - 1 of the batch. */
typedef struct {
    Py_ssize_t begin, end;
    slot *adapter;
    size_t work; /* where its workspace begins */
} segment;

typedef struct {
    PyObject *x, *names;
    gate_plan base; /* of its terms none is kept */
    slot *slots;
    segment *segments;
    Py_ssize_t slot_count, count, rows;
    pk_mat mx, my;
    char *work;
    atomic_int rc;
} batch;

/* The adapter as it is now. False: the composed path has to run. */
static bool slot_find(const module_state *state, PyObject *layer, batch *b, slot *out) {
    gate_plan plan;
    TensorView view;
    const gate_reason reason = gate_adapter(state, layer, out->name, &plan);
    bool ok = reason == GATE_NO_ADAPTER;
    if (reason == GATE_OK && gate_input(state, b->x, &plan, &view) == GATE_OK) {
        ok = plan.terms[0].dropout == NULL && !forward_wants_graph(state, &plan, b->x) &&
             forward_factor(state, &plan.terms[0], &out->factor);
        out->down = plan.terms[0].down;
        out->up = plan.terms[0].up;
        Py_INCREF(out->down);
        Py_INCREF(out->up);
    }
    if (b->base.base == NULL && ok) {
        b->base = plan;
        b->base.count = 0;
        plan.base = plan.weight = plan.bias = NULL;
    }
    gate_release(&plan);
    return ok;
}

/* The slot of the adapter of that name, found before or now; NULL: the composed path has to run. */
static slot *slot_of(const module_state *state, PyObject *layer, PyObject *name, batch *b) {
    slot *out = b->slots + b->slot_count;
    for (slot *s = b->slots; s < out; s++) {
        if (s->name == name || PyUnicode_Compare(s->name, name) == 0) return s;
    }
    out->name = name;
    b->slot_count++;
    return slot_find(state, layer, b, out) ? out : NULL;
}

/* Splits the names into runs. False: the composed path has to run. */
static bool segments_find(const module_state *state, PyObject *layer, batch *b) {
    for (Py_ssize_t i = 0; i < b->rows; i++) {
        PyObject *name = PyList_GetItem(b->names, i);
        segment *last = b->segments + b->count;
        slot *adapter;
        if (!PyUnicode_Check(name) || (adapter = slot_of(state, layer, name, b)) == NULL) return false;
        if (b->count > 0 && last[-1].adapter == adapter) {
            last[-1].end = i + 1;
            continue;
        }
        last->begin = i;
        last->end = i + 1;
        last->adapter = adapter;
        b->count++;
    }
    return true;
}

/* The rows of a segment in a matrix that has several for each row of the batch. */
static pk_mat rows_of(const batch *b, const segment *s, pk_mat all) {
    const int64_t inner = all.rows / b->rows;
    all.data = (char *)all.data + s->begin * inner * all.rs * pk_dtype_size(all.dtype);
    all.rows = (s->end - s->begin) * inner;
    return all;
}

static void run_segment(batch *b, const segment *s, pk_parallel_fn parallel) {
    const pk_mat x = rows_of(b, s, b->mx), y = rows_of(b, s, b->my);
    int rc;
    if (s->adapter->down == NULL) return;
    rc = pk_lowrank_apply(&y, &x, &s->adapter->factor, 1, NULL, b->work + s->work, parallel);
    if (rc != PK_OK) atomic_store(&b->rc, rc);
}

static void run_segments(int64_t begin, int64_t end, void *ctx) {
    batch *const b = ctx;
    for (int64_t i = begin; i < end; i++) run_segment(b, &b->segments[i], NULL);
}

/* All segments: side by side when there is none that is half of the batch, else each in all threads. */
static int segments_run(const module_state *state, batch *b) {
    size_t size = 0;
    Py_ssize_t longest = 0;
    int64_t work = 0;
    for (Py_ssize_t i = 0; i < b->count; i++) {
        segment *s = &b->segments[i];
        const pk_mat x = rows_of(b, s, b->mx), y = rows_of(b, s, b->my);
        if (s->adapter->down == NULL) continue;
        s->work = size;
        size += (pk_lowrank_apply_work(&y, &x, &s->adapter->factor, 1) + 63) / 64 * 64;
        if (s->end - s->begin > longest) longest = s->end - s->begin;
        work += (x.rows + FORWARD_READING) * s->adapter->factor.down.rows * (x.cols + y.cols);
    }
    if ((b->work = malloc(size + 1)) == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    if (work <= FORWARD_PARALLEL) {
        run_segments(0, b->count, b);
    } else {
        const pk_parallel_fn parallel = state->torch.torch_parallel_for;
        PyThreadState *thread = PyEval_SaveThread();
        if (2 * longest <= b->rows) {
            if (parallel(0, b->count, 1, run_segments, b) != 0) atomic_store(&b->rc, PK_EPARALLEL);
        } else {
            for (Py_ssize_t i = 0; i < b->count; i++) run_segment(b, &b->segments[i], parallel);
        }
        PyEval_RestoreThread(thread);
    }
    free(b->work);
    return b->rc == PK_OK ? 0 : forward_error(b->rc);
}

/* Do x and y have a row for each name, and the same rows? */
static bool batch_fits(const module_state *state, batch *b, PyObject *y) {
    TensorView vx, vy;
    if (!view_is_plain(state, y) || view_peek(state, b->x, &vx) != VIEW_OK || view_peek(state, y, &vy) != VIEW_OK)
        return false;
    if (vx.ndim < 2 || vx.ndim != vy.ndim || vx.shape[0] != b->rows || vx.numel == 0 || vy.numel == 0) return false;
    if (memcmp(vx.shape, vy.shape, sizeof vx.shape[0] * (size_t)(vx.ndim - 1)) != 0) return false;
    if (view_writable(&vy) != VIEW_OK || view_may_overlap(&vx, &vy)) return false;
    if (!view_as_rows(&vx, &b->mx) || !view_as_rows(&vy, &b->my)) return false;
    for (Py_ssize_t i = 0; i < b->slot_count; i++) {
        if (b->slots[i].down != NULL && b->slots[i].factor.up.rows != b->my.cols) return false;
    }
    return true;
}

/* y with the terms added, or with y None the layer's output. New reference to it or to None; NULL with an exception. */
static PyObject *run(module_state *state, PyObject *layer, PyObject *y, batch *b) {
    PyObject *out = y;
    if (gate_ambient(state) != GATE_OK || !view_is_plain(state, b->x) || !segments_find(state, layer, b))
        Py_RETURN_NONE;
    if (y != Py_None) {
        Py_INCREF(out);
    } else if (b->base.weight == NULL || forward_wants_graph(state, &b->base, b->x)) {
        Py_RETURN_NONE;
    } else {
        out = forward_base(state, &b->base, b->x);
    }
    if (out == NULL) return NULL;
    if (!batch_fits(state, b, out)) {
        Py_DECREF(out);
        Py_RETURN_NONE;
    }
    if (segments_run(state, b) < 0) Py_CLEAR(out);
    return out;
}

static PyObject *mixed_lowrank(PyObject *module, PyObject *args) {
    PyObject *layer, *y, *result = NULL;
    batch b = {.base = {.base = NULL}, .rc = PK_OK};
    if (!PyArg_ParseTuple(args, "OOOO!:lowrank_mixed", &layer, &b.x, &y, &PyList_Type, &b.names)) return NULL;
    b.rows = PyList_Size(b.names);
    b.slots = calloc((size_t)b.rows + 1, sizeof *b.slots);
    b.segments = calloc((size_t)b.rows + 1, sizeof *b.segments);
    if (b.slots == NULL || b.segments == NULL) {
        PyErr_NoMemory();
    } else {
        result = run(state_of(module), layer, y, &b);
    }
    for (Py_ssize_t i = 0; i < b.slot_count; i++) {
        Py_XDECREF(b.slots[i].down);
        Py_XDECREF(b.slots[i].up);
    }
    gate_release(&b.base);
    free(b.slots);
    free(b.segments);
    return result;
}

PyMethodDef mixed_methods[] = {
    {"lowrank_mixed", mixed_lowrank, METH_VARARGS,
     "lowrank_mixed(layer, x, y, names)\n--\n\n"
     "y[i] += the low-rank term of adapter names[i] for x[i], in place, for all rows i whose adapter the layer has, "
     "and y "
     "is\nreturned. With y None: the layer's output. None when the composed path has to run; then nothing was "
     "written."},
    {NULL, NULL, 0, NULL},
};
