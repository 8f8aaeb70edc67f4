/* mixed.c: segments of rows, each through the kernels of its adapter: of a linear layer, whose rows are multiplied, or of
 * an embedding, whose ids are looked up. */
#include "mixed.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

/* An adapter of the batch. */
typedef struct {
    PyObject *name;      /* borrowed: from the names, or of an embedding the factors themselves */
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
    PyObject *x, *names; /* or a list of factors */
    int64_t *ids;        /* of an embedding: owned, contiguous; else NULL, and mx is used */
    gate_plan base;      /* of its terms none is kept */
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

/* Row i, which follows those before it, has this adapter. */
static void segment_add(batch *b, Py_ssize_t i, slot *adapter) {
    segment *last = b->segments + b->count;
    if (b->count > 0 && last[-1].adapter == adapter) {
        last[-1].end = i + 1;
        return;
    }
    *last = (segment){.begin = i, .end = i + 1, .adapter = adapter};
    b->count++;
}

/* Splits the names into runs. False: the composed path has to run. */
static bool segments_find(const module_state *state, PyObject *layer, batch *b) {
    for (Py_ssize_t i = 0; i < b->rows; i++) {
        PyObject *name = PyList_GetItem(b->names, i);
        slot *adapter;
        if (!PyUnicode_Check(name) || (adapter = slot_of(state, layer, name, b)) == NULL) return false;
        segment_add(b, i, adapter);
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
    const pk_mat y = rows_of(b, s, b->my);
    const pk_lowrank *factor = &s->adapter->factor;
    char *const work = b->work + s->work;
    int rc;
    if (s->adapter->down == NULL) return;
    if (b->ids != NULL) {
        rc = pk_lookup_apply(&y, b->ids + s->begin * (b->my.rows / b->rows), factor, 1, work, parallel);
    } else {
        const pk_mat x = rows_of(b, s, b->mx);
        rc = pk_lowrank_apply(&y, &x, factor, 1, NULL, work, parallel);
    }
    if (rc != PK_OK) atomic_store(&b->rc, rc);
}

static void run_segments(int64_t begin, int64_t end, void *ctx) {
    batch *const b = ctx;
    for (int64_t i = begin; i < end; i++) run_segment(b, &b->segments[i], NULL);
}

/* Gives a segment its workspace, `size` being taken already; returns about how many multiply-adds it is. */
static int64_t segment_plan(const batch *b, segment *s, size_t *size) {
    const pk_mat y = rows_of(b, s, b->my);
    const pk_lowrank *factor = &s->adapter->factor;
    int64_t inner = y.cols;
    if (s->adapter->down == NULL) return 0;
    s->work = *size;
    if (b->ids != NULL) {
        *size += (pk_lookup_apply_work(&y, factor, 1) + 63) / 64 * 64;
    } else {
        const pk_mat x = rows_of(b, s, b->mx);
        *size += (pk_lowrank_apply_work(&y, &x, factor, 1) + 63) / 64 * 64;
        inner += x.cols;
    }
    return (y.rows + FORWARD_READING) * factor->down.rows * inner;
}

/* All segments: side by side when there is none that is half of the batch, else each in all threads. */
static int segments_run(const module_state *state, batch *b) {
    size_t size = 0;
    Py_ssize_t longest = 0;
    int64_t work = 0;
    for (Py_ssize_t i = 0; i < b->count; i++) {
        segment *s = &b->segments[i];
        work += segment_plan(b, s, &size);
        if (s->adapter->down != NULL && s->end - s->begin > longest) longest = s->end - s->begin;
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

/* 0, or -1 with an exception. The batch starts as zeros. */
static int batch_start(batch *b) {
    b->slots = calloc((size_t)b->rows + 1, sizeof *b->slots);
    b->segments = calloc((size_t)b->rows + 1, sizeof *b->segments);
    if (b->slots != NULL && b->segments != NULL) return 0;
    PyErr_NoMemory();
    return -1;
}

static void batch_free(batch *b) {
    for (Py_ssize_t i = 0; i < b->slot_count; i++) {
        Py_XDECREF(b->slots[i].down);
        Py_XDECREF(b->slots[i].up);
    }
    gate_release(&b->base);
    free(b->ids);
    free(b->slots);
    free(b->segments);
}

static PyObject *mixed_lowrank(PyObject *module, PyObject *args) {
    PyObject *layer, *y, *result = NULL;
    batch b = {.base = {.base = NULL}, .rc = PK_OK};
    if (!PyArg_ParseTuple(args, "OOOO!:lowrank_mixed", &layer, &b.x, &y, &PyList_Type, &b.names)) return NULL;
    b.rows = PyList_Size(b.names);
    if (batch_start(&b) == 0) result = run(state_of(module), layer, y, &b);
    batch_free(&b);
    return result;
}

/* ------------------------------------------------------------------------------------------------------ embeddings */

/* Copies the ids, int32 or int64, and says which is the largest, -1 if one is below 0. 1 done, 0 they are others or do not
 * have y's shape, -1 with an exception. */
static int ids_find(const module_state *state, batch *b, const TensorView *y, int64_t *largest) {
    dl_tensor raw;
    int64_t count;
    if (!view_integers(state, b->x, &raw, &count) || raw.ndim != y->ndim - 1) return 0;
    if (memcmp(raw.shape, y->shape, sizeof raw.shape[0] * (size_t)raw.ndim) != 0) return 0;
    const bool narrow = raw.dtype.bits == 32;
    if ((b->ids = malloc((size_t)count * sizeof *b->ids)) == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    const char *data = (const char *)raw.data + raw.byte_offset;
    int64_t all = 0;
    *largest = 0;
    for (int64_t i = 0; i < count; i++) {
        const int64_t id =
            narrow ? ((const int32_t *)(const void *)data)[i] : ((const int64_t *)(const void *)data)[i];
        b->ids[i] = id;
        all |= id;
        if (id > *largest) *largest = id;
    }
    if (all < 0) *largest = -1;
    return 1;
}

/* (A, B, scale) as a slot; 1 done, 0 the composed path has to run, -1 with an exception. */
static int factors_find(const module_state *state, PyObject *factors, int64_t columns, int64_t largest, slot *out) {
    TensorView down, up;
    if (!PyTuple_Check(factors) || PyTuple_Size(factors) != 3) {
        PyErr_SetString(PyExc_TypeError, "the terms must be None or (A, B, scale)");
        return -1;
    }
    PyObject *A = PyTuple_GetItem(factors, 0), *B = PyTuple_GetItem(factors, 1);
    out->factor.scale = PyFloat_AsDouble(PyTuple_GetItem(factors, 2));
    if (out->factor.scale == -1.0 && PyErr_Occurred()) return -1;
    if (!view_is_plain(state, A) || !view_is_plain(state, B)) return 0;
    if (view_peek(state, A, &down) != VIEW_OK || view_peek(state, B, &up) != VIEW_OK) return 0;
    if (down.ndim != 2 || up.ndim != 2 || !view_as_rows(&down, &out->factor.down)) return 0;
    if (!view_as_rows(&up, &out->factor.up) || down.shape[0] != up.shape[1] || up.shape[0] != columns) return 0;
    if (largest >= down.shape[1]) return 0;
    out->down = Py_NewRef(A);
    out->up = Py_NewRef(B);
    return 1;
}

/* Splits the terms into runs of the same object; as above. */
static int terms_find(const module_state *state, batch *b, int64_t largest) {
    for (Py_ssize_t i = 0; i < b->rows; i++) {
        PyObject *term = PyList_GetItem(b->names, i);
        slot *at = b->slots;
        while (at < b->slots + b->slot_count && at->name != term) at++;
        if (at == b->slots + b->slot_count) {
            const int found = term == Py_None ? 1 : factors_find(state, term, b->my.cols, largest, at);
            if (found <= 0) return found;
            at->name = term;
            b->slot_count++;
        }
        segment_add(b, i, at);
    }
    return 1;
}

static PyObject *mixed_lookup(PyObject *module, PyObject *const *arguments, Py_ssize_t count) {
    const module_state *state = state_of(module);
    batch b = {.base = {.base = NULL}, .rc = PK_OK};
    TensorView y;
    int64_t largest;
    int done = 0;
    if (count != 3 || !PyList_Check(arguments[2])) {
        PyErr_SetString(PyExc_TypeError, "lookup_add(y, x, terms): terms is a list");
        return NULL;
    }
    b.x = arguments[1];
    b.names = arguments[2];
    b.rows = PyList_Size(b.names);
    if (view_is_plain(state, arguments[0]) && view_peek(state, arguments[0], &y) == VIEW_OK &&
        view_writable(&y) == VIEW_OK && y.numel > 0 && y.ndim > 1 && y.shape[0] == b.rows && view_as_rows(&y, &b.my))
        done = ids_find(state, &b, &y, &largest);
    if (done > 0 && largest < 0) done = 0;
    if (done > 0) done = batch_start(&b) < 0 ? -1 : terms_find(state, &b, largest);
    if (done > 0 && segments_run(state, &b) < 0) done = -1;
    batch_free(&b);
    return done < 0 ? NULL : PyBool_FromLong(done);
}

PyMethodDef mixed_methods[] = {
    {"lowrank_mixed", mixed_lowrank, METH_VARARGS,
     "lowrank_mixed(layer, x, y, names)\n--\n\n"
     "y[i] += the low-rank term of adapter names[i] for x[i], in place, for all rows i whose adapter the layer has,\n"
     "and y is returned. With y None: the layer's output. None when the composed path has to run; then nothing was\n"
     "written."},
    {"lookup_add", (PyCFunction)(void (*)(void))mixed_lookup, METH_FASTCALL,
     "lookup_add(y, x, terms)\n--\n\n"
     "y[i] += scale * A[:, x[i]].T @ B.T, in place, for all rows i with terms[i] = (A, B, scale), not None.\n"
     "False: not C's; nothing was written."},
    {NULL, NULL, 0, NULL},
};
