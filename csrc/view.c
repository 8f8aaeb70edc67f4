/* view.c: torch tensors through the DLPack exchange table, numpy arrays by their struct, others through __dlpack__. */
#include "view.h"

#include <numpy/ndarraytypes.h>
#include <string.h>

#define KEEPER_VERSIONED "peft_c.dltensor_versioned"
#define KEEPER_LEGACY "peft_c.dltensor"

const char *view_dtype_name(pk_dtype dtype) {
    static const char *const names[] = {
#define X(dtype, name, bits, code) [dtype] = name,
        VIEW_DTYPES(X)
#undef X
    };
    return names[dtype];
}

/* ------------------------------------------------------------------------------------------------ statuses, errors */

const char *view_status_text(view_status status) {
    static const char *const texts[] = {
#define X(name, exception, text) [VIEW_##name] = text,
        VIEW_STATUSES(X)
#undef X
    };
    return texts[status];
}

static PyObject *status_exception(view_status status) {
    switch (status) {
#define X(name, exception, text) \
    case VIEW_##name: \
        return PyExc_##exception;
        VIEW_STATUSES(X)
#undef X
    }
    return PyExc_RuntimeError;
}

/* "dtype int64, device cpu", as far as the object can say. New reference; never fails with an exception left. */
static PyObject *object_details(PyObject *object) {
    PyObject *dtype = PyObject_GetAttrString(object, "dtype");
    PyObject *device = dtype ? PyObject_GetAttrString(object, "device") : NULL, *text = NULL;
    PyErr_Clear();
    if (device != NULL) text = PyUnicode_FromFormat(" of dtype %S on %S", dtype, device);
    if (text == NULL) PyErr_Clear();
    Py_XDECREF(dtype);
    Py_XDECREF(device);
    return text ? text : PyUnicode_FromString("");
}

int view_raise(view_status status, PyObject *object, const char *what) {
    PyObject *details = object_details(object), *type = (PyObject *)Py_TYPE(object), *name = NULL;
    if (details == NULL) return -1;
    name = PyObject_GetAttrString(type, "__name__");
    if (name != NULL) {
        PyErr_Format(status_exception(status), "%s (%U%U) %s", what, name, details, view_status_text(status));
    }
    Py_XDECREF(name);
    Py_DECREF(details);
    return -1;
}

/* ------------------------------------------------------------------------------------------------------- filling */

static view_status dtype_find(dl_dtype given, pk_dtype *out) {
    if (given.lanes != 1) return VIEW_LANES;
#define X(pk, name, width, kind) \
    if (given.code == (kind) && given.bits == (width)) { \
        *out = pk; \
        return VIEW_OK; \
    }
    VIEW_DTYPES(X)
#undef X
    return VIEW_DTYPE;
}

/* What every source must satisfy once data, ndim, shape and dtype are set. */
static view_status view_check(TensorView *view) {
    if (view->numel == 0) {
        view->data = NULL;
    } else if (view->data == NULL) {
        return VIEW_NO_DATA;
    } else if ((uintptr_t)view->data % (uintptr_t)pk_dtype_size(view->dtype) != 0) {
        return VIEW_MISALIGNED;
    }
    return VIEW_OK;
}

static view_status view_fill(const dl_tensor *tensor, TensorView *out) {
    view_status status = VIEW_OK;
    if (tensor->device.type != DL_CPU && tensor->device.type != DL_CUDA_HOST) return VIEW_DEVICE;
    if (tensor->ndim > VIEW_MAX_DIMS) return VIEW_DIMS;
    if ((status = dtype_find(tensor->dtype, &out->dtype)) != VIEW_OK) return status;
    out->ndim = tensor->ndim;
    out->numel = 1;
    for (int i = out->ndim - 1; i >= 0; i--) {
        out->shape[i] = tensor->shape[i];
        out->strides[i] = tensor->strides != NULL ? tensor->strides[i] : out->numel;
        out->numel *= tensor->shape[i];
    }
    out->data = tensor->data != NULL ? (char *)tensor->data + tensor->byte_offset : NULL;
    return view_check(out);
}

/* ------------------------------------------------------------------------------------------------------- sources */

/* The answer of a method without arguments: 1, 0, or -1 without an exception. */
static int ask(PyObject *method, PyObject *object) {
    PyObject *answer = PyObject_CallFunctionObjArgs(method, object, NULL);
    int yes = -1;
    if (answer != NULL) {
        yes = PyObject_IsTrue(answer);
        Py_DECREF(answer);
    }
    if (yes < 0) PyErr_Clear();
    return yes;
}

/* The exchange table's view, before the bits that it does not show are asked for. */
static view_status torch_view(const module_state *state, PyObject *tensor, TensorView *out, bool *is_complex) {
    dl_tensor raw;
    out->keep = NULL;
    out->read_only = false;
    *is_complex = false;
    if (state->torch.dlpack->tensor_from_object(tensor, &raw) != 0) {
        PyErr_Clear();
        return VIEW_NO_STRIDES;
    }
    *is_complex = raw.dtype.code == DL_COMPLEX;
    return view_fill(&raw, out);
}

/* A tensor that the exchange table refused: what is it? */
static view_status refused(const module_state *state, PyObject *tensor) {
    static const struct {
        const char *flag;
        view_status status;
    } kinds[] = {
        {"is_quantized", VIEW_QUANTIZED}, {"is_nested", VIEW_NESTED}, {"is_sparse", VIEW_SPARSE},
        {"is_sparse_csr", VIEW_SPARSE},   {"is_mkldnn", VIEW_MKLDNN}, {"is_meta", VIEW_META},
    };
    if (ask(state->objects.is_functorch_tensor, tensor) == 1) return VIEW_FUNCTORCH;
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
        PyObject *flag = PyObject_GetAttrString(tensor, kinds[i].flag);
        const bool yes = flag == Py_True;
        if (flag == NULL) PyErr_Clear();
        Py_XDECREF(flag);
        if (yes) return kinds[i].status;
    }
    return VIEW_NO_STRIDES;
}

view_status view_again(const module_state *state, PyObject *tensor, TensorView *out) {
    bool is_complex;
    return torch_view(state, tensor, out, &is_complex);
}

view_status view_peek(const module_state *state, PyObject *tensor, TensorView *out) {
    bool is_complex;
    const view_status status = torch_view(state, tensor, out, &is_complex);
    if (status == VIEW_NO_STRIDES) return refused(state, tensor);
    if (is_complex && ask(state->objects.is_conj, tensor) != 0) return VIEW_CONJ;
    if (status == VIEW_OK && ask(state->objects.is_neg, tensor) != 0) return VIEW_NEG;
    return status;
}

static view_status numpy_dtype(const PyArrayObject *array, pk_dtype *out) {
    const PyArray_Descr *descr = PyArray_DESCR(array);
    if (descr->byteorder != '=' && descr->byteorder != '|' && descr->byteorder != NPY_NATBYTE) return VIEW_BYTE_ORDER;
    switch (descr->type_num) {
    case NPY_FLOAT:
        *out = PK_F32;
        return VIEW_OK;
    case NPY_DOUBLE:
        *out = PK_F64;
        return VIEW_OK;
    case NPY_HALF:
        *out = PK_F16;
        return VIEW_OK;
    default:
        return VIEW_DTYPE;
    }
}

/* NumPy's array struct, read in place: its layout is part of NumPy's ABI, so no function table has to be loaded. */
static view_status numpy_view(PyArrayObject *array, TensorView *out) {
    const npy_intp *strides = PyArray_STRIDES(array);
    view_status status = numpy_dtype(array, &out->dtype);
    int64_t size;
    if (status != VIEW_OK) return status;
    if (PyArray_NDIM(array) > VIEW_MAX_DIMS) return VIEW_DIMS;
    size = pk_dtype_size(out->dtype);
    out->data = PyArray_DATA(array);
    out->ndim = PyArray_NDIM(array);
    out->read_only = (PyArray_FLAGS(array) & NPY_ARRAY_WRITEABLE) == 0;
    out->numel = 1;
    for (int i = 0; i < out->ndim; i++) {
        out->shape[i] = PyArray_DIM(array, i);
        if (out->shape[i] > 1 && strides[i] % size != 0) return VIEW_MISALIGNED;
        out->strides[i] = strides[i] / size;
        out->numel *= out->shape[i];
    }
    return view_check(out);
}

/* numpy.ndarray if numpy is imported and `object` is one, without importing it: 1, 0, or -1 with an exception. */
static int numpy_is_array(PyObject *object) {
    PyObject *modules = PyImport_GetModuleDict(), *numpy, *type;
    int yes;
    numpy = modules ? PyDict_GetItemString(modules, "numpy") : NULL; /* borrowed */
    if (numpy == NULL) return 0;
    type = PyObject_GetAttrString(numpy, "ndarray");
    if (type == NULL) return -1;
    yes = PyObject_IsInstance(object, type);
    Py_DECREF(type);
    return yes;
}

/* Frees what the producer lent. Its deleter may run Python, so an exception on its way is put aside meanwhile. */
static void capsule_keeper_free(PyObject *keeper) {
    const char *name = PyCapsule_GetName(keeper);
    void *managed = PyCapsule_GetPointer(keeper, name);
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    if (strcmp(name, KEEPER_VERSIONED) == 0) {
        dl_managed_versioned *versioned = managed;
        if (versioned->deleter != NULL) versioned->deleter(versioned);
    } else {
        dl_managed *legacy = managed;
        if (legacy->deleter != NULL) legacy->deleter(legacy);
    }
    PyErr_Restore(type, value, trace);
}

/* Takes over a capsule of `__dlpack__` as the protocol says: renamed "used_...", its tensor freed by our keeper. */
static int capsule_view(PyObject *capsule, TensorView *out, view_status *status) {
    const dl_tensor *tensor = NULL;
    if (PyCapsule_IsValid(capsule, "dltensor_versioned")) {
        dl_managed_versioned *managed = PyCapsule_GetPointer(capsule, "dltensor_versioned");
        out->keep = PyCapsule_New(managed, KEEPER_VERSIONED, capsule_keeper_free);
        if (out->keep == NULL) return -1;
        if (PyCapsule_SetName(capsule, "used_dltensor_versioned") < 0) return -1;
        if (managed->version.major != DL_MAJOR) {
            PyErr_Format(PyExc_BufferError, "DLPack %u.%u is not supported, 1.x is", managed->version.major,
                         managed->version.minor);
            return -1;
        }
        out->read_only = (managed->flags & DL_FLAG_READ_ONLY) != 0;
        tensor = &managed->tensor;
    } else {
        dl_managed *managed = PyCapsule_GetPointer(capsule, "dltensor"); /* raises for any other capsule */
        if (managed == NULL) return -1;
        out->keep = PyCapsule_New(managed, KEEPER_LEGACY, capsule_keeper_free);
        if (out->keep == NULL || PyCapsule_SetName(capsule, "used_dltensor") < 0) return -1;
        tensor = &managed->tensor;
    }
    *status = view_fill(tensor, out);
    return 0;
}

/* Another producer: obj.__dlpack__(max_version=(1, 1)), without the argument for producers older than DLPack 1. */
static int producer_view(const module_state *state, PyObject *object, TensorView *out, view_status *status) {
    int rc = -1;
    PyObject *empty = PyTuple_New(0), *kwargs = Py_BuildValue("{s(ii)}", "max_version", DL_MAJOR, 1);
    PyObject *method = PyObject_GetAttr(object, state->names.__dlpack__), *capsule = NULL;
    if (method == NULL && PyErr_ExceptionMatches(PyExc_AttributeError)) {
        PyErr_Clear();
        *status = VIEW_NO_ARRAY;
        rc = 0;
    }
    if (method == NULL || empty == NULL || kwargs == NULL) goto done;
    capsule = PyObject_Call(method, empty, kwargs);
    if (capsule == NULL && PyErr_ExceptionMatches(PyExc_TypeError)) {
        PyErr_Clear();
        capsule = PyObject_CallNoArgs(method);
    }
    if (capsule != NULL) rc = capsule_view(capsule, out, status);
done:
    Py_XDECREF(capsule);
    Py_XDECREF(method);
    Py_XDECREF(kwargs);
    Py_XDECREF(empty);
    return rc;
}

int view_get(const module_state *state, PyObject *object, const char *what, bool write, TensorView *out) {
    view_status status = VIEW_NO_ARRAY;
    int rc = -1, is = PyObject_IsInstance(object, state->objects.Tensor);
    out->keep = NULL;
    out->read_only = false;
    if (is < 0) goto done;
    if (is) {
        status = view_peek(state, object, out);
    } else {
        is = numpy_is_array(object);
        if (is < 0) goto done;
        if (is) {
            status = numpy_view((PyArrayObject *)object, out);
        } else if (producer_view(state, object, out, &status) < 0) {
            goto done;
        }
    }
    if (status == VIEW_OK && write) status = view_writable(out);
    rc = status == VIEW_OK ? 0 : view_raise(status, object, what);
done:
    if (rc < 0) view_release(out);
    return rc;
}

void view_release(TensorView *view) {
    Py_CLEAR(view->keep);
}

/* -------------------------------------------------------------------------------------------------------- layout */

static int64_t magnitude(int64_t value) {
    return value < 0 ? -value : value;
}

/* Distinct elements have distinct addresses if, by growing stride, each stride passes the extent of those before it.
 */
view_status view_writable(const TensorView *view) {
    int64_t extent = 0, last = 0; /* the largest offset within the dims taken; the last (stride) taken */
    int dims = 0;
    if (view->read_only) return VIEW_READ_ONLY;
    if (view->numel <= 1) return VIEW_OK;
    for (int i = 0; i < view->ndim; i++) dims += view->shape[i] > 1;
    while (dims-- > 0) {
        int64_t stride = INT64_MAX, size = 0;
        int equals = 0;
        for (int i = 0; i < view->ndim; i++) {
            const int64_t s = magnitude(view->strides[i]);
            if (view->shape[i] <= 1 || s <= last) continue;
            if (s == stride) equals = 1;
            if (s < stride) stride = s, size = view->shape[i], equals = 0;
        }
        if (stride == INT64_MAX || equals || stride <= extent) return VIEW_OVERLAP; /* a stride 0, or twice the same */
        extent += (size - 1) * stride;
        last = stride;
    }
    return VIEW_OK;
}

/* Dims [first, last) as one dim: its size and stride. False when they cannot be. */
static bool collapse(const TensorView *view, int first, int last, int64_t *size, int64_t *stride) {
    bool started = false;
    *size = 1;
    *stride = 0;
    for (int i = last - 1; i >= first; i--) {
        if (view->shape[i] == 1) continue;
        if (!started) {
            *stride = view->strides[i];
            started = true;
        } else if (view->strides[i] != *stride * *size && view->numel != 0) {
            return false;
        }
        *size *= view->shape[i];
    }
    return true;
}

bool view_as_rows(const TensorView *view, pk_mat *out) {
    const int last = view->ndim - 1;
    if (last < 0) return false;
    out->data = view->data;
    out->dtype = view->dtype;
    out->cols = view->shape[last];
    out->cs = view->strides[last];
    return collapse(view, 0, last, &out->rows, &out->rs);
}

bool view_as_columns(const TensorView *view, pk_mat *out) {
    if (view->ndim < 1) return false;
    out->data = view->data;
    out->dtype = view->dtype;
    out->rows = view->shape[0];
    out->rs = view->strides[0];
    return collapse(view, 1, view->ndim, &out->cols, &out->cs);
}

static void byte_range(const TensorView *view, intptr_t *low, intptr_t *high) {
    const int64_t size = pk_dtype_size(view->dtype);
    *low = (intptr_t)view->data;
    *high = *low + (intptr_t)size;
    for (int i = 0; i < view->ndim; i++) {
        const int64_t reach = (view->shape[i] - 1) * view->strides[i] * size;
        if (reach < 0)
            *low += (intptr_t)reach;
        else
            *high += (intptr_t)reach;
    }
}

bool view_may_overlap(const TensorView *a, const TensorView *b) {
    intptr_t a_low, a_high, b_low, b_high;
    if (a->numel == 0 || b->numel == 0) return false;
    byte_range(a, &a_low, &a_high);
    byte_range(b, &b_low, &b_high);
    return a_low < b_high && b_low < a_high;
}

int view_bump_version(const module_state *state, PyObject *tensor) {
    PyObject *one = PyTuple_Pack(1, tensor), *result = NULL;
    if (one != NULL) result = PyObject_CallFunctionObjArgs(state->objects.increment_version, one, NULL);
    Py_XDECREF(one);
    Py_XDECREF(result);
    return result != NULL ? 0 : -1;
}

/* -------------------------------------------------------------------------------------------------------- Python */

static PyObject *longs(const int64_t *values, int count) {
    PyObject *tuple = PyTuple_New(count);
    for (int i = 0; tuple != NULL && i < count; i++) {
        PyObject *value = PyLong_FromLongLong(values[i]);
        if (value == NULL || PyTuple_SetItem(tuple, i, value) < 0) Py_CLEAR(tuple);
    }
    return tuple;
}

static PyObject *view_describe(PyObject *module, PyObject *args) {
    TensorView view;
    PyObject *object = NULL, *result = NULL, *shape = NULL, *strides = NULL;
    int write = 0;
    if (!PyArg_ParseTuple(args, "O|p:describe", &object, &write)) return NULL;
    if (view_get(state_of(module), object, "object", write != 0, &view) < 0) return NULL;
    shape = longs(view.shape, view.ndim);
    strides = longs(view.strides, view.ndim);
    if (shape != NULL && strides != NULL) {
        result = Py_BuildValue("{s:K,s:s,s:O,s:O,s:L,s:O,s:O}", "data", (unsigned long long)(uintptr_t)view.data,
                               "dtype", view_dtype_name(view.dtype), "shape", shape, "strides", strides, "numel",
                               (long long)view.numel, "read_only", view.read_only ? Py_True : Py_False, "writable",
                               view_writable(&view) == VIEW_OK ? Py_True : Py_False);
    }
    Py_XDECREF(shape);
    Py_XDECREF(strides);
    view_release(&view);
    return result;
}

PyMethodDef view_methods[] = {
    {"describe", view_describe, METH_VARARGS,
     "describe(object, write=False)\n--\n\n"
     "What C sees of a tensor or array: data, dtype, shape, strides (in elements), numel, read_only, writable.\n"
     "With write=True, refuse what cannot be written to. TypeError or ValueError says why an object has no view."},
    {NULL, NULL, 0, NULL},
};
