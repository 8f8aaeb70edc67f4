/* merge.c: adding adapters to one weight and taking them out again, in place, on live tensors.
 *
 * A weight comes as a matrix (n, k), or a stack (e, n, k) of matrices that are worked on one after the other; so do
 * the operands: factors A (r, k), B (n, r), or one full delta (n, k). First everything is checked, then written. */
#include "merge.h"

/* What is added to the weight, as views. */
typedef struct {
    TensorView full;
    TensorView *factors; /* down, up of adapter 0, down, up of adapter 1, ... */
    pk_lowrank *terms;   /* room for the matrices of one layer of the stack */
    double *scales;
    Py_ssize_t count; /* adapters; 0: the full delta */
} change;

/* The arguments of one call as views. */
typedef struct {
    TensorView weight;
    change old, new_; /* what to take out, what to add; merging and unmerging use one of them */
    int64_t depth;    /* matrices in the stack; 1 for a plain matrix */
    pk_parallel_fn parallel;
    scratch memory;
    void *work, *room;      /* in it: the kernels' work; where a record is written, to be copied from there */
    size_t bound;           /* of the record of one matrix, of which some thirtieth is used */
    size_t work_size, used; /* bytes of work, and of the largest record */
} merge_job;

static void change_release(change *what) {
    PyMem_Free(what->factors);
    PyMem_Free(what->terms);
    PyMem_Free(what->scales);
}

static void job_release(module_state *state, merge_job *job) {
    change_release(&job->old);
    change_release(&job->new_);
    scratch_give(state, job->memory, job->work_size + job->used);
}

/* Matrix `at` of a view of two or three dimensions. */
static pk_mat matrix_at(const TensorView *view, int64_t at) {
    const int64_t *shape = view->shape + view->ndim - 2, *strides = view->strides + view->ndim - 2;
    pk_mat m = {view->data, shape[0], shape[1], strides[0], strides[1], view->dtype};
    if (view->ndim == 3 && view->data != NULL)
        m.data = view->data + at * view->strides[0] * pk_dtype_size(view->dtype);
    return m;
}

/* 1: `tensor` is a plain CPU tensor with the dimensions of the weight (2 or 3), and its view is in `out`; 0: not C's.
 */
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
static int change_term(const module_state *state, const merge_job *job, change *what, PyObject *term, Py_ssize_t i) {
    TensorView *a = &what->factors[2 * i], *b = &what->factors[2 * i + 1];
    const int d = job->weight.ndim - 2;
    if (!PyTuple_Check(term) || PyTuple_Size(term) != 3) {
        PyErr_SetString(PyExc_TypeError, "operands must be (A, B, scale) tuples, or one tensor");
        return -1;
    }
    if (!operand_view(state, PyTuple_GetItem(term, 0), &job->weight, a)) return 0;
    if (!operand_view(state, PyTuple_GetItem(term, 1), &job->weight, b)) return 0;
    what->scales[i] = PyFloat_AsDouble(PyTuple_GetItem(term, 2));
    if (what->scales[i] == -1.0 && PyErr_Occurred()) return -1;
    const int64_t *w = job->weight.shape + d;
    const bool fits = a->shape[d] == b->shape[d + 1] && a->shape[d + 1] == w[1] && b->shape[d] == w[0] &&
                      (d == 0 || (a->shape[0] == job->depth && b->shape[0] == job->depth));
    return fits ? 1 : shape_error(job, a, b);
}

/* Fills `what` from a list of (A, B, scale) or one tensor. 1: done; 0: not C's; -1: exception. */
static int change_init(const module_state *state, const merge_job *job, change *what, PyObject *operands) {
    if (!PyList_Check(operands)) {
        if (!operand_view(state, operands, &job->weight, &what->full)) return 0;
        for (int i = 0; i < job->weight.ndim; i++) {
            if (what->full.shape[i] != job->weight.shape[i]) return shape_error(job, &what->full, NULL);
        }
        return 1;
    }
    what->count = PyList_Size(operands);
    if (what->count == 0) {
        PyErr_SetString(PyExc_ValueError, "no operands given");
        return -1;
    }
    const size_t n = (size_t)what->count;
    what->factors = PyMem_Calloc(2 * n, sizeof *what->factors);
    what->terms = PyMem_Calloc(n, sizeof *what->terms);
    what->scales = PyMem_Calloc(n, sizeof *what->scales);
    if (what->factors == NULL || what->terms == NULL || what->scales == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    for (Py_ssize_t i = 0; i < what->count; i++) {
        const int got = change_term(state, job, what, PyList_GetItem(operands, i), i);
        if (got != 1) return got;
    }
    return 1;
}

bool merge_is_possible(const module_state *state, bool undo) {
    const gate_reason ambient = gate_ambient(state);
    return ambient == GATE_OK || ambient == GATE_AUTOCAST || ambient == GATE_GLOBAL_HOOKS ||
           ambient == GATE_LINEAR_PATCHED || (undo && ambient == GATE_SWITCHED_OFF);
}

/* Fills `job`; `old` and `new_` may be NULL. 1: done; 0: C may not act here; -1: exception. The caller releases in
 * every case. `undo`: see merge_is_possible. */
static int job_init(const module_state *state, merge_job *job, PyObject *weight, PyObject *old, PyObject *new_,
                    bool undo) {
    if (!merge_is_possible(state, undo)) return 0;
    if (!operand_view(state, weight, NULL, &job->weight)) return 0;
    job->depth = job->weight.ndim == 3 ? job->weight.shape[0] : 1;
    job->parallel = state->torch.torch_parallel_for;
    int got = 1;
    if (old != NULL) got = change_init(state, job, &job->old, old);
    if (got == 1 && new_ != NULL) got = change_init(state, job, &job->new_, new_);
    return got;
}

/* What is added to matrix `at` of the stack. */
static pk_delta delta_at(const change *what, int64_t at) {
    pk_delta delta = {.law = PK_DELTA, .alpha = 1.0};
    if (what->count == 0) {
        delta.full = matrix_at(&what->full, at);
        return delta;
    }
    for (Py_ssize_t i = 0; i < what->count; i++) {
        what->terms[i].down = matrix_at(&what->factors[2 * i], at);
        what->terms[i].up = matrix_at(&what->factors[2 * i + 1], at);
        what->terms[i].scale = what->scales[i];
    }
    delta.law = PK_LOWRANK;
    delta.factors = what->terms;
    delta.nf = (int)what->count;
    return delta;
}

/* Takes the memory that the kernels need for any matrix of the stack, and room for a record if one is to be made. 0, or
 * -1: exception. */
static int memory_take(module_state *state, merge_job *job, const change *old, const change *new_, int record) {
    const pk_mat w = matrix_at(&job->weight, 0);
    const pk_delta empty = {.law = PK_LOWRANK}, take = old ? delta_at(old, 0) : empty,
                   add = new_ ? delta_at(new_, 0) : empty;
    job->bound = pk_record_bound(&w);
    const size_t there = pk_merge_work(&w, old ? &take : NULL, new_ ? &add : NULL),
                 back = pk_merge_work(&w, new_ ? &add : NULL, old ? &take : NULL);
    job->work_size = ((there > back ? there : back) + 63) / 64 * 64;
    job->memory = scratch_take(state, job->work_size + (record ? job->bound : 0));
    if (job->memory.data == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    job->work = job->memory.data;
    job->room = (char *)job->memory.data + job->work_size;
    return 0;
}

/* One kernel call on matrix `at`, without the GIL: adds `add`, takes out `take` (with `read`, its record, or NULL), or
 * both in one pass. `written`: NULL, or room for the new record. A pk_status. */
static int run(const merge_job *job, int64_t at, const change *take, const pk_record *read, const change *add,
               unsigned flags, pk_record *written) {
    const pk_mat w = matrix_at(&job->weight, at);
    const pk_delta empty = {.law = PK_LOWRANK}, old = take ? delta_at(take, at) : empty,
                   new_ = add ? delta_at(add, at) : empty;
    int status;
    Py_BEGIN_ALLOW_THREADS status = take == NULL ? pk_merge(&w, &new_, flags, written, job->work, job->parallel)
                                    : add == NULL
                                        ? pk_unmerge(&w, &old, read, job->work, job->parallel)
                                        : pk_switch(&w, &old, read, &new_, flags, written, job->work, job->parallel);
    Py_END_ALLOW_THREADS return status;
}

static int status_error(int status) {
    if (status == PK_EPARALLEL) {
        PyErr_SetString(PyExc_RuntimeError, "torch's thread pool could not run the merge; the weight is unspecified");
    } else {
        PyErr_Format(PyExc_ValueError, "the weight and its change do not fit each other (kernel status %d)", status);
    }
    return -1;
}

/* The bytes of a record, borrowed; -1: exception, it is neither bytes nor a bytearray. */
static int record_read(PyObject *bytes, pk_record *out) {
    const bool array = PyByteArray_Check(bytes);
    out->data = array ? PyByteArray_AsString(bytes) : PyBytes_AsString(bytes);
    if (out->data == NULL) return -1;
    out->size = out->capacity = (size_t)(array ? PyByteArray_Size(bytes) : PyBytes_Size(bytes));
    return 0;
}

/* Record `at` of a tuple that records_get took; false for NULL. */
static bool record_at(PyObject *records, int64_t at, pk_record *out) {
    return records != NULL && record_read(PyTuple_GetItem(records, (Py_ssize_t)at), out) == 0;
}

/* Takes back what add_one did to matrices [0, end), given the records it made (or NULL: subtraction): the old change,
 * if there was one, is merged again. */
static void take_back(const merge_job *job, const change *old, PyObject *made, int64_t end) {
    for (int64_t at = end - 1; at >= 0; at--) {
        pk_record record;
        const bool recorded = record_at(made, at, &record);
        (void)run(job, at, &job->new_, recorded ? &record : NULL, old, 0, NULL);
    }
}

typedef struct {
    const char *from;
    char *to;
} copy_job;

static void copy_range(int64_t begin, int64_t end, void *ctx) {
    const copy_job *const copy = ctx;
    memcpy(copy->to + begin, copy->from + begin, (size_t)(end - begin));
}

/* A record as a new bytearray; NULL: exception. Memory that is used for the first time takes long, so all threads share. */
static PyObject *record_bytes(const merge_job *job, const pk_record *record) {
    PyObject *const bytes = PyByteArray_FromStringAndSize(NULL, (Py_ssize_t)record->size);
    if (bytes == NULL) return NULL;
    copy_job copy = {record->data, PyByteArray_AsString(bytes)};
    int32_t failed;
    Py_BEGIN_ALLOW_THREADS failed = job->parallel(0, (int64_t)record->size, 1 << 15, copy_range, &copy);
    Py_END_ALLOW_THREADS if (failed) memcpy(copy.to, copy.from, record->size);
    return bytes;
}

/* Merges the new change into matrix `at`, in place of `old` unless that is NULL (`read`: its records, or NULL). The
 * new record goes into the tuple `made` unless that is NULL. 1: done; 2: done, but what was taken out was not what
 * `read` says; 0: not finite, the matrix is as before; -1: exception, as before. */
static int add_one(merge_job *job, int64_t at, const change *old, PyObject *read, unsigned flags, PyObject *made) {
    pk_record record = {job->room, job->bound, 0}, before;
    const bool recorded = record_at(read, at, &before);
    const int status = run(job, at, old, recorded ? &before : NULL, &job->new_, flags, made ? &record : NULL);
    const int got = status == PK_OK ? 1 : status == PK_CHANGED ? 2 : status == PK_NONFINITE ? 0 : status_error(status);
    const size_t used = got > 0 ? record.size : job->bound;
    if (made == NULL) return got;
    if (used > job->used) job->used = used;
    if (got <= 0) return got;
    PyObject *const bytes = record_bytes(job, &record);
    if (bytes == NULL) {
        (void)run(job, at, &job->new_, &record, old, 0, NULL);
        return -1;
    }
    (void)PyTuple_SetItem(made, (Py_ssize_t)at, bytes); /* takes the reference; cannot fail for ours */
    return got;
}

/* add_one for the whole stack; all of it, or none. */
static int add_all(merge_job *job, const change *old, PyObject *read, unsigned flags, PyObject *made) {
    int worst = 1;
    for (int64_t at = 0; at < job->depth; at++) {
        const int got = add_one(job, at, old, read, flags, made);
        if (got <= 0) {
            take_back(job, old, made, at);
            return got;
        }
        if (got > worst) worst = got;
    }
    return worst;
}

/* NULL: no record; else the tuple `records`, if it has one for each matrix; *odd: it is something else. -1: exception.
 */
static int records_get(const merge_job *job, PyObject *records, PyObject **out, bool *odd) {
    *out = NULL;
    *odd = false;
    if (records == Py_None) return 0;
    if (PyTuple_Size(records) != (Py_ssize_t)job->depth) {
        *odd = true;
        return 0;
    }
    for (Py_ssize_t i = 0; i < PyTuple_Size(records); i++) {
        pk_record record;
        if (record_read(PyTuple_GetItem(records, i), &record) < 0) return -1;
    }
    *out = records;
    return 0;
}

PyDoc_STRVAR(
    merge_add_doc,
    "merge_add(weight, operands, check, record, owner, /)\n--\n\n"
    "weight (n, k), or a stack (e, n, k), += what `operands` say: a list of (A, B, scale), B @ A scaled, or one\n"
    "tensor of the weight's shape. Accumulated in fp32 (fp64 for fp64), rounded once; `owner`, the tensor or\n"
    "parameter whose memory it is, gets a new version.\n\n"
    "Returns (True, record), record a tuple of bytearrays (one a matrix) for merge_subtract if `record`, else None;\n"
    "(False, None) if `check` and a result is not finite: nothing has changed; None if C may not act here.");

static PyObject *merge_add(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    module_state *state = state_of(module);
    merge_job job = {.depth = 0};
    PyObject *made = NULL, *result = NULL;
    if (nargs != 5) {
        PyErr_SetString(PyExc_TypeError, "merge_add(weight, operands, check, record, owner)");
        return NULL;
    }
    const int check = PyObject_IsTrue(args[2]), keep = PyObject_IsTrue(args[3]);
    int got = check < 0 || keep < 0 ? -1 : job_init(state, &job, args[0], NULL, args[1], false);
    if (got < 0) goto done;
    if (got == 0) {
        result = Py_BuildValue("");
        goto done;
    }
    if (memory_take(state, &job, NULL, &job.new_, keep) < 0) goto done;
    if (keep && (made = PyTuple_New((Py_ssize_t)job.depth)) == NULL) goto done;
    if (view_bump_version(state, args[4]) < 0) goto done;
    got = add_all(&job, NULL, NULL, check ? PK_CHECK : 0, made);
    if (got >= 0) result = Py_BuildValue("(OO)", got ? Py_True : Py_False, got && made ? made : Py_None);
done:
    Py_XDECREF(made);
    job_release(state, &job);
    return result;
}

PyDoc_STRVAR(
    merge_subtract_doc,
    "merge_subtract(weight, operands, record, owner, /)\n--\n\n"
    "Takes out what merge_add added, given the same operands (bits and all). With its record the weight gets its\n"
    "old bits back; with None the change is subtracted.\n\n"
    "Returns True; False if some of the weight is not what merge_add left (there the change was subtracted);\n"
    "None if C may not act here.");

static PyObject *merge_subtract(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    module_state *state = state_of(module);
    merge_job job = {.depth = 0};
    PyObject *records, *result = NULL;
    bool odd;
    if (nargs != 4 || (args[2] != Py_None && !PyTuple_Check(args[2]))) {
        PyErr_SetString(PyExc_TypeError, "merge_subtract(weight, operands, record or None, owner)");
        return NULL;
    }
    const int got = job_init(state, &job, args[0], args[1], NULL, args[2] != Py_None);
    if (got < 0) goto done;
    if (got == 0) {
        result = Py_BuildValue("");
        goto done;
    }
    if (memory_take(state, &job, &job.old, NULL, 0) < 0) goto done;
    if (records_get(&job, args[2], &records, &odd) < 0 || view_bump_version(state, args[3]) < 0) goto done;
    bool same = !odd;
    for (int64_t at = job.depth - 1; at >= 0; at--) {
        pk_record record;
        const bool recorded = record_at(records, at, &record);
        const int status = run(&job, at, &job.old, recorded ? &record : NULL, NULL, 0, NULL);
        if (status != PK_OK && status != PK_CHANGED) {
            (void)status_error(status);
            goto done;
        }
        same = same && status == PK_OK;
    }
    result = PyBool_FromLong(same);
done:
    job_release(state, &job);
    return result;
}

PyDoc_STRVAR(
    merge_switch_doc,
    "merge_switch(weight, old, old_record, new, check, record, owner, /)\n--\n\n"
    "merge_subtract(weight, old, old_record) and merge_add(weight, new, check, record) in one pass over the weight,\n"
    "with the same bits and the same record.\n\n"
    "Returns (finite, record, same): as from merge_add, and False if some of the weight was not what old_record\n"
    "says. If it is not finite, nothing has changed. None if C may not act here.");

static PyObject *merge_switch(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    module_state *state = state_of(module);
    merge_job job = {.depth = 0};
    PyObject *read, *made = NULL, *result = NULL;
    bool odd;
    if (nargs != 7 || (args[2] != Py_None && !PyTuple_Check(args[2]))) {
        PyErr_SetString(PyExc_TypeError, "merge_switch(weight, old, old_record or None, new, check, record, owner)");
        return NULL;
    }
    const int check = PyObject_IsTrue(args[4]), keep = PyObject_IsTrue(args[5]);
    int got = check < 0 || keep < 0 ? -1 : job_init(state, &job, args[0], args[1], args[3], args[2] != Py_None);
    if (got < 0) goto done;
    if (got == 0) {
        result = Py_BuildValue("");
        goto done;
    }
    if (records_get(&job, args[2], &read, &odd) < 0) goto done;
    if (memory_take(state, &job, &job.old, &job.new_, keep) < 0) goto done;
    if (keep && (made = PyTuple_New((Py_ssize_t)job.depth)) == NULL) goto done;
    if (view_bump_version(state, args[6]) < 0) goto done;
    got = add_all(&job, &job.old, read, check ? PK_CHECK : 0, made);
    if (got >= 0) {
        result = Py_BuildValue("(OOO)", got ? Py_True : Py_False, got && made ? made : Py_None,
                               got == 1 && !odd ? Py_True : Py_False);
    }
done:
    Py_XDECREF(made);
    job_release(state, &job);
    return result;
}

PyMethodDef merge_methods[] = {
    {"merge_add", (PyCFunction)(void (*)(void))merge_add, METH_FASTCALL, merge_add_doc},
    {"merge_subtract", (PyCFunction)(void (*)(void))merge_subtract, METH_FASTCALL, merge_subtract_doc},
    {"merge_switch", (PyCFunction)(void (*)(void))merge_switch, METH_FASTCALL, merge_switch_doc},
    {NULL, NULL, 0, NULL},
};
