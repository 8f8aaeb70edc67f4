/* merge_exchange.c: giving a weight other values as a whole, in place, while its old ones are kept. */
#include "merge.h"

#include <string.h>

/* Are the elements one array without gaps, in whatever order of dimensions? */
static bool is_dense(const TensorView *view) {
    bool taken[VIEW_MAX_DIMS] = {false};
    int64_t span = 1;
    for (int found = 0; found < view->ndim; found++) {
        int next = 0;
        while (next < view->ndim && (taken[next] || (view->shape[next] != 1 && view->strides[next] != span))) next++;
        if (next == view->ndim) return false;
        taken[next] = true;
        span *= view->shape[next];
    }
    return true;
}

/* A plain CPU tensor that is one array. */
static bool array_view(const module_state *state, PyObject *tensor, TensorView *out) {
    return view_is_plain(state, tensor) && view_peek(state, tensor, out) == VIEW_OK && is_dense(out);
}

static bool are_alike(const TensorView *a, const TensorView *b) {
    if (a->dtype != b->dtype || a->ndim != b->ndim) return false;
    for (int i = 0; i < a->ndim; i++) {
        if (a->shape[i] != b->shape[i] || (a->shape[i] > 1 && a->strides[i] != b->strides[i])) return false;
    }
    return true;
}

static int status_error(int status) {
    PyErr_Format(PyExc_RuntimeError, "torch's thread pool could not run the exchange (kernel status %d)", status);
    return -1;
}

/* Both as arrays that may change places. */
static bool pair_view(const module_state *state, PyObject *weight, PyObject *other, TensorView *w, TensorView *o) {
    return merge_is_possible(state, false) && array_view(state, weight, w) && array_view(state, other, o) &&
           are_alike(w, o) && !view_may_overlap(w, o);
}

PyDoc_STRVAR(exchange_doc,
             "exchange(weight, other, add, check, owner, /)\n--\n\n"
             "weight gets the values of other (with add: weight + other, rounded once), other those that weight had;\n"
             "both have the same dtype, shape and strides. `owner`, the tensor or parameter whose memory weight is,\n"
             "gets a new version.\n\n"
             "Returns (True, digest of the new weight); (False, 0) if `check` and a result is not finite: the weight\n"
             "has not changed then, but other has; None if C may not act here.");

static PyObject *exchange(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    const module_state *state = state_of(module);
    TensorView weight, other;
    uint64_t digest = 0;
    int status;
    if (nargs != 5) {
        PyErr_SetString(PyExc_TypeError, "exchange(weight, other, add, check, owner)");
        return NULL;
    }
    const int add = PyObject_IsTrue(args[2]), check = PyObject_IsTrue(args[3]);
    if (add < 0 || check < 0) return NULL;
    if (!pair_view(state, args[0], args[1], &weight, &other)) Py_RETURN_NONE;
    if (view_bump_version(state, args[4]) < 0) return NULL;
    Py_BEGIN_ALLOW_THREADS status = pk_exchange(weight.dtype, weight.data, other.data, weight.numel, add,
                                                check ? PK_CHECK : 0, &digest, state->torch.torch_parallel_for);
    Py_END_ALLOW_THREADS if (status != PK_OK && status != PK_NONFINITE) {
        (void)status_error(status);
        return NULL;
    }
    if (status == PK_NONFINITE) return Py_BuildValue("(Oi)", Py_False, 0);
    return Py_BuildValue("(OK)", Py_True, (unsigned long long)digest);
}

PyDoc_STRVAR(restore_doc, "restore(weight, other, digest, owner, /)\n--\n\n"
                          "exchange(weight, other, False, False, owner), if weight has this digest.\n\n"
                          "Returns whether it has; if not, nothing has changed. None if C may not act here.");

static PyObject *restore(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    const module_state *state = state_of(module);
    TensorView weight, other;
    int status;
    if (nargs != 4) {
        PyErr_SetString(PyExc_TypeError, "restore(weight, other, digest, owner)");
        return NULL;
    }
    const uint64_t wanted = PyLong_AsUnsignedLongLongMask(args[2]);
    if (wanted == (uint64_t)-1 && PyErr_Occurred()) return NULL;
    if (!pair_view(state, args[0], args[1], &weight, &other)) Py_RETURN_NONE;
    if (view_bump_version(state, args[3]) < 0) return NULL;
    Py_BEGIN_ALLOW_THREADS status =
        pk_exchange_back(weight.dtype, weight.data, other.data, weight.numel, wanted, state->torch.torch_parallel_for);
    Py_END_ALLOW_THREADS if (status != PK_OK && status != PK_CHANGED) {
        (void)status_error(status);
        return NULL;
    }
    return PyBool_FromLong(status == PK_OK);
}

PyDoc_STRVAR(digest_doc, "digest(tensor, /)\n--\n\n"
                         "A number that tells the tensor's bits from others; None if it is no dense CPU tensor.");

static PyObject *digest(PyObject *module, PyObject *tensor) {
    const module_state *state = state_of(module);
    TensorView view;
    uint64_t result = 0;
    int status;
    if (!array_view(state, tensor, &view)) Py_RETURN_NONE;
    Py_BEGIN_ALLOW_THREADS status =
        pk_digest(view.dtype, view.data, view.numel, &result, state->torch.torch_parallel_for);
    Py_END_ALLOW_THREADS if (status != PK_OK) {
        (void)status_error(status);
        return NULL;
    }
    return PyLong_FromUnsignedLongLong(result);
}

PyMethodDef exchange_methods[] = {
    {"exchange", (PyCFunction)(void (*)(void))exchange, METH_FASTCALL, exchange_doc},
    {"restore", (PyCFunction)(void (*)(void))restore, METH_FASTCALL, restore_doc},
    {"digest", digest, METH_O, digest_doc},
    {NULL, NULL, 0, NULL},
};
