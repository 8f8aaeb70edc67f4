/* merge_exchange.c: giving a weight other values as a whole, in place, while its old ones are kept. */
#include "merge.h"

#include <stdlib.h>
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

/* One array in the order of the indices. */
static bool is_flat(const TensorView *view) {
    int64_t span = 1;
    for (int i = view->ndim - 1; i >= 0; i--) {
        if (view->shape[i] != 1 && view->strides[i] != span) return false;
        span *= view->shape[i];
    }
    return true;
}

static bool are_alike(const TensorView *a, const TensorView *b) {
    if (a->dtype != b->dtype || a->ndim != b->ndim) return false;
    for (int i = 0; i < a->ndim; i++) {
        if (a->shape[i] != b->shape[i] || (a->shape[i] > 1 && a->strides[i] != b->strides[i])) return false;
    }
    return true;
}

/* Raises what a kernel's status says, if it is none of those that are answers. */
static bool is_error(int status) {
    if (status == PK_EINVAL) {
        PyErr_SetString(PyExc_IndexError, "a place is outside of the weight, or the values do not fit it");
    } else if (status < 0) {
        PyErr_Format(PyExc_RuntimeError, "torch's thread pool could not run the exchange (kernel status %d)", status);
    }
    return status < 0;
}

/* Places as one array of int32 or int64; None: there are none. */
static bool places_find(const module_state *state, PyObject *tensor, const TensorView *w, pk_pair *pair) {
    dl_tensor raw;
    pair->size = w->numel;
    if (tensor == Py_None) return true;
    if (!view_integers(state, tensor, &raw, &pair->n) || raw.ndim != 1) return false;
    pair->narrow = raw.dtype.bits == 32;
    pair->places = pair->n ? (const char *)raw.data + raw.byte_offset : "";
    return true;
}

/* w and o, which are not the same memory, as arrays that may change places: all of w or elements of it. */
static bool pair_find(const module_state *state, PyObject *weight, PyObject *other, PyObject *places, TensorView *w,
                      TensorView *o, pk_pair *pair) {
    memset(pair, 0, sizeof *pair);
    if (!merge_is_possible(state, false) || !array_view(state, weight, w) || !array_view(state, other, o))
        return false;
    pair->dtype = w->dtype;
    pair->w = w->data;
    pair->other = o->data;
    pair->n = w->numel;
    if (!places_find(state, places, w, pair) || view_may_overlap(w, o)) return false;
    if (pair->places == NULL) return are_alike(w, o);
    return is_flat(w) && o->dtype == w->dtype && o->ndim == 1 && o->numel == pair->n;
}

static int answer_truth(PyObject *flag, unsigned *out) {
    const int truth = PyObject_IsTrue(flag);
    *out = truth > 0;
    return truth < 0 ? -1 : 0;
}

/* The exchange with a new version for its owner: (finite, digest). */
static PyObject *exchange_run(const module_state *state, const pk_pair *pair, const pk_operand *by, unsigned check,
                              PyObject *owner) {
    uint64_t digest = 0;
    int status;
    if (view_bump_version(state, owner) < 0) return NULL;
    Py_BEGIN_ALLOW_THREADS status =
        pk_exchange(pair, by, check ? PK_CHECK : 0, pair->other ? &digest : NULL, state->torch.torch_parallel_for);
    Py_END_ALLOW_THREADS if (is_error(status)) return NULL;
    if (status == PK_NONFINITE) return Py_BuildValue("(Oi)", Py_False, 0);
    return Py_BuildValue("(OK)", Py_True, (unsigned long long)digest);
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
    pk_pair pair;
    unsigned add, check;
    if (nargs != 5) {
        PyErr_SetString(PyExc_TypeError, "exchange(weight, other, add, check, owner)");
        return NULL;
    }
    if (answer_truth(args[2], &add) < 0 || answer_truth(args[3], &check) < 0) return NULL;
    if (!pair_find(state, args[0], args[1], Py_None, &weight, &other, &pair)) Py_RETURN_NONE;
    const pk_operand by = {pair.other, pair.dtype, 1, pair.n, 0};
    return exchange_run(state, &pair, add ? &by : NULL, check, args[4]);
}

/* One hash for each block of a product, as bytes; 0: no such. */
static bool hashes_find(PyObject *bytes, pk_pair *pair) {
    if (!PyBytes_Check(bytes) || (size_t)PyBytes_Size(bytes) != pk_exchange_blocks(pair) * sizeof *pair->hashes)
        return false;
    pair->hashes = (uint32_t *)(void *)PyBytes_AsString(bytes);
    return true;
}

/* The operands of `combine` and `uncombine`. 1, 0 where C may not act, -1 with an exception. */
static int combine_find(const module_state *state, PyObject *const *args, PyObject *product, PyObject *places,
                        pk_pair *pair, pk_operand *by) {
    TensorView weight, other, values;
    const long long run = PyLong_AsLongLong(args[3]);
    unsigned multiply;
    if ((run == -1 && PyErr_Occurred()) || answer_truth(product, &multiply) < 0) return -1;
    if (!pair_find(state, args[0], args[1], places, &weight, &other, pair) || !array_view(state, args[2], &values) ||
        !is_flat(&weight) || !is_flat(&values) || (values.dtype == PK_F64) != (pair->dtype == PK_F64) ||
        view_may_overlap(&weight, &values) || view_may_overlap(&other, &values))
        return 0;
    *by = (pk_operand){values.data, values.dtype, run, values.numel, (int)multiply};
    return 1;
}

PyDoc_STRVAR(
    combine_doc,
    "combine(weight, old, values, run, multiply, places, check, owner, /)\n--\n\n"
    "weight + values or, with multiply, weight * values, rounded once; `old`, like weight, gets what was in it.\n"
    "The value of element i of the contiguous weight is values[i // run % len(values)]; values (k,) of any\n"
    "dtype. With places (nnz,), int32 or int64, all different, values and old are of these elements only.\n\n"
    "Returns what `exchange` does, but bytes, which `uncombine` takes, for the digest of a product. IndexError:\n"
    "a place is outside; nothing has changed.");

static PyObject *combine(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    const module_state *state = state_of(module);
    pk_pair pair;
    pk_operand by;
    unsigned check;
    if (nargs != 8) {
        PyErr_SetString(PyExc_TypeError, "combine(weight, old, values, run, multiply, places, check, owner)");
        return NULL;
    }
    const int found = answer_truth(args[6], &check) < 0 ? -1 : combine_find(state, args, args[4], args[5], &pair, &by);
    if (found < 0) return NULL;
    if (found == 0) Py_RETURN_NONE;
    ask_for_large_pages(pair.other, (size_t)(pair.n * pk_dtype_size(pair.dtype)));
    if (!by.multiply) return exchange_run(state, &pair, &by, check, args[7]);
    PyObject *const hashes =
        PyBytes_FromStringAndSize(NULL, (Py_ssize_t)(pk_exchange_blocks(&pair) * sizeof *pair.hashes));
    if (hashes == NULL || !hashes_find(hashes, &pair)) return NULL;
    PyObject *done = exchange_run(state, &pair, &by, check, args[7]);
    if (done != NULL && PyTuple_GetItem(done, 0) == Py_True) {
        Py_DECREF(done);
        done = Py_BuildValue("(OO)", Py_True, hashes);
    }
    Py_DECREF(hashes);
    return done;
}

PyDoc_STRVAR(accumulate_doc,
             "accumulate(y, values, multiply, /)\n--\n\n"
             "y += values or, with multiply, y *= values, rounded once. Both are contiguous; values, of any\n"
             "dtype, have the shape of y, or that of its last dimension. Autograd does not see it.\n\n"
             "Returns whether that was done; if not, C may not act here.");

static PyObject *accumulate(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    const module_state *state = state_of(module);
    TensorView y, v;
    unsigned multiply;
    if (nargs != 3) {
        PyErr_SetString(PyExc_TypeError, "accumulate(y, values, multiply)");
        return NULL;
    }
    if (answer_truth(args[2], &multiply) < 0) return NULL;
    if (!merge_is_possible(state, false) || !array_view(state, args[0], &y) || !array_view(state, args[1], &v) ||
        !is_flat(&y) || !is_flat(&v) || (v.dtype == PK_F64) != (y.dtype == PK_F64) || view_may_overlap(&y, &v))
        Py_RETURN_FALSE;
    for (int i = 1; i <= v.ndim; i++)
        if (i > y.ndim || v.shape[v.ndim - i] != y.shape[y.ndim - i]) Py_RETURN_FALSE;
    if (v.ndim != y.ndim && v.ndim != 1) Py_RETURN_FALSE;
    const pk_pair pair = {.dtype = y.dtype, .w = y.data, .n = y.numel, .size = y.numel};
    const pk_operand by = {v.data, v.dtype, 1, v.numel, (int)multiply};
    PyObject *const done = exchange_run(state, &pair, &by, 0, args[0]);
    if (done == NULL) return NULL;
    Py_DECREF(done);
    Py_RETURN_TRUE;
}

PyDoc_STRVAR(uncombine_doc, "uncombine(weight, old, values, run, hashes, owner, /)\n--\n\n"
                            "weight gets the values of old if it is what `combine` has made of old and values, with\n"
                            "multiply, and returned these hashes for.\n\n"
                            "Returns whether it is; if not, nothing has changed. None if C may not act here.");

static PyObject *uncombine(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    const module_state *state = state_of(module);
    pk_pair pair;
    pk_operand by;
    unsigned char *done;
    int status;
    if (nargs != 6) {
        PyErr_SetString(PyExc_TypeError, "uncombine(weight, old, values, run, hashes, owner)");
        return NULL;
    }
    const int found = combine_find(state, args, Py_True, Py_None, &pair, &by);
    if (found < 0) return NULL;
    if (found == 0) Py_RETURN_NONE;
    if (!hashes_find(args[4], &pair)) {
        PyErr_SetString(PyExc_TypeError, "uncombine: hashes must be the bytes that combine returned for this weight");
        return NULL;
    }
    if ((done = malloc(pk_exchange_blocks(&pair) + 1)) == NULL) return PyErr_NoMemory();
    if (view_bump_version(state, args[5]) < 0) {
        free(done);
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS status = pk_uncombine(&pair, &by, done, state->torch.torch_parallel_for);
    Py_END_ALLOW_THREADS free(done);
    if (is_error(status)) return NULL;
    return PyBool_FromLong(status == PK_OK);
}

PyDoc_STRVAR(restore_doc, "restore(weight, other, digest, owner, places=None, /)\n--\n\n"
                          "exchange(weight, other, False, False, owner), if weight, or its elements at these places,\n"
                          "have this digest.\n\n"
                          "Returns whether they have; if not, nothing has changed. None if C may not act here.");

static PyObject *restore(PyObject *module, PyObject *const *args, Py_ssize_t nargs) {
    const module_state *state = state_of(module);
    TensorView weight, other;
    pk_pair pair;
    int status;
    if (nargs != 4 && nargs != 5) {
        PyErr_SetString(PyExc_TypeError, "restore(weight, other, digest, owner, places=None)");
        return NULL;
    }
    const uint64_t wanted = PyLong_AsUnsignedLongLongMask(args[2]);
    if (wanted == (uint64_t)-1 && PyErr_Occurred()) return NULL;
    if (!pair_find(state, args[0], args[1], nargs == 5 ? args[4] : Py_None, &weight, &other, &pair)) Py_RETURN_NONE;
    if (view_bump_version(state, args[3]) < 0) return NULL;
    Py_BEGIN_ALLOW_THREADS status = pk_exchange_back(&pair, wanted, state->torch.torch_parallel_for);
    Py_END_ALLOW_THREADS if (is_error(status)) return NULL;
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
    Py_END_ALLOW_THREADS if (is_error(status)) return NULL;
    return PyLong_FromUnsignedLongLong(result);
}

PyDoc_STRVAR(finite_doc, "finite(tensor, /)\n--\n\n"
                         "Whether all elements are finite; None if it is no dense CPU tensor of a floating dtype.");

static PyObject *finite(PyObject *module, PyObject *tensor) {
    const module_state *state = state_of(module);
    TensorView view;
    if (!array_view(state, tensor, &view)) Py_RETURN_NONE;
    const pk_mat all = {view.data, view.numel, 1, 1, 1, view.dtype};
    int result;
    Py_BEGIN_ALLOW_THREADS result = pk_finite(&all, state->torch.torch_parallel_for);
    Py_END_ALLOW_THREADS if (is_error(result)) return NULL;
    return PyBool_FromLong(result);
}

/* The elements' bits of any dtype as an array, for a digest. */
static bool bits_view(const module_state *state, PyObject *tensor, TensorView *out) {
    static const struct {
        int64_t size;
        pk_dtype dtype;
    } kinds[] = {{8, PK_F64}, {4, PK_F32}, {2, PK_BF16}};
    dl_tensor raw;
    if (!view_is_plain(state, tensor) || state->torch.dlpack->tensor_from_object(tensor, &raw) != 0) {
        PyErr_Clear();
        return false;
    }
    if (raw.device.type != DL_CPU || raw.ndim > VIEW_MAX_DIMS || raw.dtype.bits % 8 != 0) return false;
    out->ndim = raw.ndim;
    out->numel = 1;
    for (int i = raw.ndim - 1; i >= 0; i--) {
        out->shape[i] = raw.shape[i];
        out->strides[i] = raw.strides != NULL ? raw.strides[i] : out->numel;
        out->numel *= raw.shape[i];
    }
    out->data = (char *)raw.data + raw.byte_offset;
    if (!is_dense(out) || (raw.data == NULL && out->numel)) return false;
    const int64_t bytes = out->numel * raw.dtype.bits / 8 * raw.dtype.lanes;
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
        out->dtype = kinds[i].dtype;
        out->numel = bytes / kinds[i].size;
        if (bytes % kinds[i].size == 0) return true;
    }
    return false;
}

static uint64_t stirred(uint64_t all, uint64_t one) {
    all = (all ^ one) * 0x9e3779b97f4a7c15u;
    return all ^ all >> 29;
}

PyDoc_STRVAR(
    fingerprint_doc,
    "fingerprint(tensors, /)\n--\n\n"
    "A number that tells the bits, shapes and strides of a list of tensors, of any dtypes, from others; None if\n"
    "one of them is no dense CPU tensor.");

static PyObject *fingerprint(PyObject *module, PyObject *tensors) {
    const module_state *state = state_of(module);
    const Py_ssize_t count = PyList_Check(tensors) ? PyList_Size(tensors) : -1;
    uint64_t all = 0, one = 0;
    if (count < 0) {
        PyErr_SetString(PyExc_TypeError, "fingerprint(tensors): a list");
        return NULL;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        TensorView view;
        int status;
        if (!bits_view(state, PyList_GetItem(tensors, i), &view)) Py_RETURN_NONE;
        status = pk_digest(view.dtype, view.data, view.numel, &one, state->torch.torch_parallel_for);
        if (is_error(status)) return NULL;
        all = stirred(all, one);
        for (int j = 0; j < view.ndim; j++)
            all = stirred(stirred(all, (uint64_t)view.shape[j]), (uint64_t)view.strides[j]);
    }
    return PyLong_FromUnsignedLongLong(all);
}

PyMethodDef exchange_methods[] = {
    {"exchange", (PyCFunction)(void (*)(void))exchange, METH_FASTCALL, exchange_doc},
    {"combine", (PyCFunction)(void (*)(void))combine, METH_FASTCALL, combine_doc},
    {"accumulate", (PyCFunction)(void (*)(void))accumulate, METH_FASTCALL, accumulate_doc},
    {"uncombine", (PyCFunction)(void (*)(void))uncombine, METH_FASTCALL, uncombine_doc},
    {"restore", (PyCFunction)(void (*)(void))restore, METH_FASTCALL, restore_doc},
    {"digest", digest, METH_O, digest_doc},
    {"finite", finite, METH_O, finite_doc},
    {"fingerprint", fingerprint, METH_O, fingerprint_doc},
    {NULL, NULL, 0, NULL},
};
