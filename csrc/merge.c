/* merge.c: adding adapters to one weight and taking them out again, in place, on live tensors.
 *
 * A weight comes as a matrix (n, k), or a stack (e, n, k) of matrices that are worked on one after the other; so do the
 * operands: factors A (r, k), B (n, r), or one full delta (n, k). First everything is checked, then written. */
#include "merge.h"

#include <stdlib.h>

/* The arguments of one call as views; `owner` is the tensor whose version counts the writes (borrowed). */
typedef struct {
    TensorView weight, full;
    TensorView *factors; /* down, up of adapter 0, down, up of adapter 1, ... */
    pk_lowrank *terms;   /* room for the matrices of one layer of the stack */
    double *scales;
    Py_ssize_t count; /* adapters; 0: the full delta */
    int64_t depth;    /* matrices in the stack; 1 for a plain matrix */
    pk_parallel_fn parallel;
} merge_job;

static void job_release(merge_job *job) {
    PyMem_Free(job->factors);
    PyMem_Free(job->terms);
    PyMem_Free(job->scales);
}

/* Matrix `at` of a view of two or three dimensions. */
static pk_mat matrix_at(const TensorView *view, int64_t at) {
    const int64_t *shape = view->shape + view->ndim - 2, *strides = view->strides + view->ndim - 2;
    pk_mat m = {view->data, shape[0], shape[1], strides[0], strides[1], view->dtype};
    if (view->ndim == 3 && view->data != NULL) m.data = view->data + at * view->strides[0] * pk_dtype_size(view->dtype);
    return m;
}

/* 1: `tensor` is a plain CPU tensor with the dimensions of the weight (2 or 3), and its view is in `out`; 0: not C's. */
static int operand_view(const module_state *state, PyObject *tensor, const TensorView *weight, TensorView *out) {
    if (!view_is_plain(state, tensor) || view_peek(state, tensor, out) != VIEW_OK) return 0;
    if (weight == NULL) return (out->ndim == 2 || out->ndim == 3) && view_writable(out) == VIEW_OK;
    return out->ndim == weight->ndim && !view_may_overlap(out, weight);
}

static int shape_error(const merge_job *job, const TensorView *a, const TensorView *b) {
    const int d = job->weight.ndim - 2;
    const int64_t *w = job->weight.shape + d;
    if (b == NULL) {
        PyErr_Format(PyExc_ValueError, "a delta of shape (%lld, %lld) does not fit a weight of shape (%lld, %lld)",
                     (long long)a->shape[d], (long long)a->shape[d + 1], (long long)w[0], (long long)w[1]);
    } else {
        PyErr_Format(PyExc_ValueError,
                     "factors A (%lld, %lld) and B (%lld, %lld) do not fit a weight of shape (%lld, %lld)",
                     (long long)a->shape[d], (long long)a->shape[d + 1], (long long)b->shape[d],
                     (long long)b->shape[d + 1], (long long)w[0], (long long)w[1]);
    }
    return -1;
}

/* Reads one (A, B, scale). 1: done; 0: not C's; -1: exception. */
static int job_term(const module_state *state, merge_job *job, PyObject *term, Py_ssize_t i) {
    TensorView *a = &job->factors[2 * i], *b = &job->factors[2 * i + 1];
    const int d = job->weight.ndim - 2;
    if (!PyTuple_Check(term) || PyTuple_Size(term) != 3) {
        PyErr_SetString(PyExc_TypeError, "operands must be (A, B, scale) tuples, or one tensor");
        return -1;
    }
    if (!operand_view(state, PyTuple_GetItem(term, 0), &job->weight, a)) return 0;
    if (!operand_view(state, PyTuple_GetItem(term, 1), &job->weight, b)) return 0;
    job->scales[i] = PyFloat_AsDouble(PyTuple_GetItem(term, 2));
    if (job->scales[i] == -1.0 && PyErr_Occurred()) return -1;
    const int64_t *w = job->weight.shape + d;
    const bool fits = a->shape[d] == b->shape[d + 1] && a->shape[d + 1] == w[1] && b->shape[d] == w[0] &&
                      (d == 0 || (a->shape[0] == job->depth && b->shape[0] == job->depth));
    return fits ? 1 : shape_error(job, a, b);
}

/* Fills `job`. 1: done; 0: C may not act here; -1: exception. The caller releases in every case. */
static int job_init(const module_state *state, merge_job *job, PyObject *weight, PyObject *operands) {
    const gate_reason ambient = gate_ambient(state);
    if (ambient != GATE_OK && ambient != GATE_AUTOCAST && ambient != GATE_GLOBAL_HOOKS) return 0;
    if (!operand_view(state, weight, NULL, &job->weight)) return 0;
    job->depth = job->weight.ndim == 3 ? job->weight.shape[0] : 1;
    job->parallel = state->torch.torch_parallel_for;
    if (!PyList_Check(operands)) {
        if (!operand_view(state, operands, &job->weight, &job->full)) return 0;
        for (int i = 0; i < job->weight.ndim; i++) {
            if (job->full.shape[i] != job->weight.shape[i]) return shape_error(job, &job->full, NULL);
        }
        return 1;
    }
    job->count = PyList_Size(operands);
    if (job->count == 0) {
        PyErr_SetString(PyExc_ValueError, "no operands given");
        return -1;
    }
    const size_t n = (size_t)job->count;
    job->factors = PyMem_Calloc(2 * n, sizeof *job->factors);
    job->terms = PyMem_Calloc(n, sizeof *job->terms);
    job->scales = PyMem_Calloc(n, sizeof *job->scales);
    if (job->factors == NULL || job->terms == NULL || job->scales == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    for (Py_ssize_t i = 0; i < job->count; i++) {
        const int got = job_term(state, job, PyList_GetItem(operands, i), i);
        if (got != 1) return got;
    }
    return 1;
}

/* What is added to matrix `at` of the stack. */
static pk_delta delta_at(const merge_job *job, int64_t at) {
    pk_delta delta = {.law = PK_DELTA, .alpha = 1.0};
    if (job->count == 0) {
        delta.full = matrix_at(&job->full, at);
        return delta;
    }
    for (Py_ssize_t i = 0; i < job->count; i++) {
        job->terms[i].down = matrix_at(&job->factors[2 * i], at);
        job->terms[i].up = matrix_at(&job->factors[2 * i + 1], at);
        job->terms[i].scale = job->scales[i];
    }
    delta.law = PK_LOWRANK;
    delta.factors = job->terms;
    delta.nf = (int)job->count;
    return delta;
}

/* pk_merge (add) or pk_unmerge of matrix `at`, without the GIL. A pk_status, or PK_EINVAL - 2 if there is no memory. */
enum { NO_MEMORY = PK_EINVAL - 2 };
static int run(const merge_job *job, int64_t at, bool add, unsigned flags, pk_record *record) {
    const pk_mat w = matrix_at(&job->weight, at);
    const pk_delta delta = delta_at(job, at);
    const size_t size = add ? pk_merge_work(&w, NULL, &delta) : pk_merge_work(&w, &delta, NULL);
    int status = NO_MEMORY;
    Py_BEGIN_ALLOW_THREADS
    void *work = size ? malloc(size) : NULL;
    if (add && record != NULL) {
        record->capacity = pk_record_bound(&w);
        record->data = malloc(record->capacity ? record->capacity : 1);
    }
    if ((size == 0 || work != NULL) && (record == NULL || record->data != NULL)) {
        status = add ? pk_merge(&w, &delta, flags, record, work, job->parallel)
                     : pk_unmerge(&w, &delta, record, work, job->parallel);
    }
    free(work);
    Py_END_ALLOW_THREADS
    return status;
}

static int status_error(int status) {
    if (status == NO_MEMORY) {
        PyErr_NoMemory();
    } else if (status == PK_EPARALLEL) {
        PyErr_SetString(PyExc_RuntimeError, "torch's thread pool could not run the merge; the weight is unspecified");
    } else {
        PyErr_Format(PyExc_ValueError, "the weight and its change do not fit each other (kernel status %d)", status);
    }
    return -1;
}

/* Takes back matrices [0, end) with the records in `undo` (NULL: subtraction); keeps the current exception. */
static void take_back(const merge_job *job, PyObject *undo, int64_t end) {
    for (int64_t at = end - 1; at >= 0; at--) {
        pk_record record = {NULL, 0, 0};
        PyObject *bytes = undo ? PyTuple_GetItem(undo, (Py_ssize_t)at) : NULL;
        if (bytes != NULL) {
            record.data = PyBytes_AsString(bytes);
            record.size = record.capacity = (size_t)PyBytes_Size(bytes);
        }
        (void)run(job, at, false, 0, bytes ? &record : NULL);
    }
}

/* Merges matrix `at`. 1: done; 0: not finite, the matrix is as before; -1: exception, as before. */
static int add_one(const merge_job *job, int64_t at, unsigned flags, PyObject *undo) {
    pk_record record = {NULL, 0, 0};
    const int status = run(job, at, true, flags, undo ? &record : NULL);
    int got = status == PK_OK ? 1 : status == PK_NONFINITE ? 0 : status_error(status);
    if (got == 1 && undo != NULL) {
        PyObject *bytes = PyBytes_FromStringAndSize(record.data, (Py_ssize_t)record.size);
        if (bytes == NULL || PyTuple_SetItem(undo, (Py_ssize_t)at, bytes) < 0) {
            (void)run(job, at, false, 0, &record);
            got = -1;
        }
    }
    free(record.data);
    return got;
}

PyDoc_STRVAR(merge_add_doc,
             "merge_add(weight, operands, check, record, owner, /)\n--\n\n"
             "weight (n, k), or a stack (e, n, k), += what `operands` say: a list of (A, B, scale), B @ A scaled, or one\n"
             "tensor of the weight's shape. Accumulated in fp32 (fp64 for fp64), rounded once; `owner`, the tensor or\n"
             "parameter whose memory it is, gets a new version.\n\n"
             "Returns (True, record), record a tuple of bytes (one a matrix) for merge_subtract if `record`, else None;\n"
             "(False, None) if `check` and a result is not finite: nothing has changed; None if C may not act here.");

static PyObject *merge_add(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    const module_state *state = state_of(module);
    merge_job job = {.count = 0};
    PyObject *undo = NULL, *result = NULL;
    if (nargs != 5) {
        PyErr_SetString(PyExc_TypeError, "merge_add(weight, operands, check, record, owner)");
        return NULL;
    }
    const int check = PyObject_IsTrue(args[2]), keep = PyObject_IsTrue(args[3]);
    int got = check < 0 || keep < 0 ? -1 : job_init(state, &job, args[0], args[1]);
    if (got < 0) goto done;
    if (got == 0) {
        Py_INCREF(Py_None);
        result = Py_None;
        goto done;
    }
    if (keep && (undo = PyTuple_New((Py_ssize_t)job.depth)) == NULL) goto done;
    if (view_bump_version(state, args[4]) < 0) goto done;
    for (int64_t at = 0; at < job.depth && got == 1; at++) {
        got = add_one(&job, at, check ? PK_CHECK : 0, undo);
        if (got != 1) take_back(&job, undo, at);
    }
    if (got == 1) {
        result = Py_BuildValue("(OO)", Py_True, undo ? undo : Py_None);
    } else if (got == 0) {
        result = Py_BuildValue("(OO)", Py_False, Py_None);
    }
done:
    Py_XDECREF(undo);
    job_release(&job);
    return result;
}

PyDoc_STRVAR(merge_subtract_doc,
             "merge_subtract(weight, operands, record, owner, /)\n--\n\n"
             "Takes out what merge_add added, given the same operands (bits and all). With its record the weight gets its\n"
             "old bits back; with None the change is subtracted.\n\n"
             "Returns True; False if some of the weight is not what merge_add left (there the change was subtracted);\n"
             "None if C may not act here.");

static PyObject *merge_subtract(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    const module_state *state = state_of(module);
    merge_job job = {.count = 0};
    PyObject *result = NULL;
    if (nargs != 4 || (args[2] != Py_None && !PyTuple_Check(args[2]))) {
        PyErr_SetString(PyExc_TypeError, "merge_subtract(weight, operands, record or None, owner)");
        return NULL;
    }
    const int got = job_init(state, &job, args[0], args[1]);
    if (got < 0) goto done;
    bool same = got == 1;
    const bool recorded = args[2] != Py_None && PyTuple_Size(args[2]) == (Py_ssize_t)job.depth;
    for (Py_ssize_t i = 0; recorded && i < PyTuple_Size(args[2]); i++) {
        if (PyBytes_AsString(PyTuple_GetItem(args[2], i)) == NULL) goto done;
    }
    if (got == 1 && view_bump_version(state, args[3]) < 0) goto done;
    for (int64_t at = got == 1 ? job.depth - 1 : -1; at >= 0; at--) {
        pk_record record = {NULL, 0, 0};
        if (recorded) {
            PyObject *bytes = PyTuple_GetItem(args[2], (Py_ssize_t)at);
            record.data = PyBytes_AsString(bytes);
            record.size = record.capacity = (size_t)PyBytes_Size(bytes);
        }
        const int status = run(&job, at, false, 0, recorded ? &record : NULL);
        if (status != PK_OK && status != PK_CHANGED) {
            (void)status_error(status);
            goto done;
        }
        same = same && status == PK_OK;
    }
    same = same && (recorded || args[2] == Py_None);
    result = got == 0 ? Py_None : same ? Py_True : Py_False;
    Py_INCREF(result);
done:
    job_release(&job);
    return result;
}

PyMethodDef merge_methods[] = {
    {"merge_add", (PyCFunction)(void (*)(void))merge_add, METH_FASTCALL, merge_add_doc},
    {"merge_subtract", (PyCFunction)(void (*)(void))merge_subtract, METH_FASTCALL, merge_subtract_doc},
    {NULL, NULL, 0, NULL},
};
