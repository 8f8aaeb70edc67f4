/* view.h: TensorView, the one way from a Python object to memory.
 *
 * A view copies data pointer, dtype, shape and strides. Nothing of a torch tensor or numpy array is kept: the caller
 * holds the object, and drops the view before any other Python or torch call could free, resize or rebind its storage.
 */
#ifndef PEFT_C_VIEW_H
#define PEFT_C_VIEW_H

#include "kernels/kernels.h"
#include "state.h"

enum { VIEW_MAX_DIMS = 16 };

/* One row a supported dtype: X(pk_dtype, torch's name, bits, DLPack code) */
#define VIEW_DTYPES(X) \
    X(PK_F32, "float32", 32, DL_FLOAT) \
    X(PK_F64, "float64", 64, DL_FLOAT) \
    X(PK_BF16, "bfloat16", 16, DL_BFLOAT) \
    X(PK_F16, "float16", 16, DL_FLOAT)

/* Why an object has no view: X(NAME, exception, what the error says after "<argument> ") */
#define VIEW_STATUSES(X) \
    X(OK, TypeError, "is fine") \
    X(NO_ARRAY, TypeError, "is no tensor or array") \
    X(NO_STRIDES, TypeError, "has no strided storage of its own") \
    X(META, TypeError, "is on the meta device: a shape without data") \
    X(SPARSE, TypeError, "is sparse; call to_dense() first") \
    X(MKLDNN, TypeError, "has mkldnn layout; call to_dense() first") \
    X(QUANTIZED, TypeError, "is quantized; call dequantize() first") \
    X(NESTED, TypeError, "is a nested tensor") \
    X(FUNCTORCH, TypeError, "belongs to a torch.func transform (vmap, grad, ...)") \
    X(NO_DATA, TypeError, "has no data (a fake, functional or wrapper tensor, or freed storage)") \
    X(DEVICE, ValueError, "is not on the CPU") \
    X(DTYPE, TypeError, "has an unsupported dtype; float32, float64, bfloat16 and float16 are") \
    X(LANES, TypeError, "has a dtype that packs several values into one element (lanes != 1)") \
    X(CONJ, ValueError, "has its conjugate bit set; call resolve_conj() first") \
    X(NEG, ValueError, "has its negative bit set; call resolve_neg() first") \
    X(DIMS, ValueError, "has more than 16 dimensions") \
    X(MISALIGNED, ValueError, "is not aligned to its element size; call clone() or copy() first") \
    X(BYTE_ORDER, ValueError, "is not in the machine's byte order") \
    X(READ_ONLY, ValueError, "is read-only and cannot be written to") \
    X(OVERLAP, ValueError, "has elements that share memory (an expanded tensor) and cannot be written to")

typedef enum {
#define X(name, exception, text) VIEW_##name,
    VIEW_STATUSES(X)
#undef X
} view_status;

typedef struct {
    char *data; /* first element; NULL when numel is 0 */
    int64_t numel;
    pk_dtype dtype;
    int ndim;
    bool read_only;                 /* the producer says so (numpy, __dlpack__ with the flag) */
    PyObject *keep;                 /* owned; only for `__dlpack__` producers: what keeps the memory alive */
    int64_t shape[VIEW_MAX_DIMS];   /* only the first ndim are set */
    int64_t strides[VIEW_MAX_DIMS]; /* in elements */
} TensorView;

/* "bfloat16": torch's name of the dtype. */
const char *view_dtype_name(pk_dtype dtype);

/* Is `object` exactly a torch.Tensor or torch.nn.Parameter (no subclass)? */
static inline bool view_is_plain(const module_state *state, PyObject *object) {
    const PyTypeObject *type = Py_TYPE(object);
    return (const void *)type == (void *)state->objects.Tensor ||
           (const void *)type == (void *)state->objects.Parameter;
}

/* Is `tensor` a plain CPU tensor of int32 or int64, one array in the order of its indices? Then `raw` is its view, and
 * *numel its elements. No exception. */
static inline bool view_integers(const module_state *state, PyObject *tensor, dl_tensor *raw, int64_t *numel) {
    if (!view_is_plain(state, tensor) || state->torch.dlpack->tensor_from_object(tensor, raw) != 0) {
        PyErr_Clear();
        return false;
    }
    if (raw->device.type != DL_CPU || raw->dtype.code != DL_INT) return false;
    if (raw->dtype.bits != 32 && raw->dtype.bits != 64) return false;
    *numel = 1;
    for (int i = raw->ndim - 1; i >= 0; i--) {
        if (raw->strides != NULL && raw->shape[i] > 1 && raw->strides[i] != *numel) return false;
        *numel *= raw->shape[i];
    }
    return true;
}

/* View of a torch tensor (any instance of torch.Tensor; the caller checks the type), without leaving an exception set.
 */
view_status view_peek(const module_state *state, PyObject *tensor, TensorView *out);

/* The same for a tensor that view_peek has accepted before: its data, shape and strides as they are now. */
view_status view_again(const module_state *state, PyObject *tensor, TensorView *out);

/* Could the memory of `view` be written to? VIEW_OK, VIEW_READ_ONLY or VIEW_OVERLAP. */
view_status view_writable(const TensorView *view);

/* The text of a status: "has no data ..." */
const char *view_status_text(view_status status);

/* Sets the exception of `status` for the argument called `what`. Returns -1. */
int view_raise(view_status status, PyObject *object, const char *what);

/* View of a torch tensor, numpy array or `__dlpack__` producer; `what` names it in errors ("weight of layer q_proj").
 * With `write`, refuses what cannot be written to. 0, or -1 with an exception and nothing to release. */
int view_get(const module_state *state, PyObject *object, const char *what, bool write, TensorView *out);

/* Drops what a `__dlpack__` producer lent; harmless on any view made by the functions here. */
void view_release(TensorView *view);

/* `view` as a matrix of its last dimension: (d0, ..., dk, n) -> (d0 * ... * dk, n); 1-d becomes one row. False when
 * the leading strides cannot be one stride, or ndim is 0. */
bool view_as_rows(const TensorView *view, pk_mat *out);

/* `view` as a matrix of its first dimension: (n, d1, ..., dk) -> (n, d1 * ... * dk), as a convolution's weight is.
 * False as above. */
bool view_as_columns(const TensorView *view, pk_mat *out);

/* The same memory with rows and columns exchanged. */
static inline pk_mat view_transposed(pk_mat m) {
    const pk_mat t = {m.data, m.cols, m.rows, m.cs, m.rs, m.dtype};
    return t;
}

/* Do the two views share any byte between their lowest and highest element? */
bool view_may_overlap(const TensorView *a, const TensorView *b);

/* Tells autograd that `tensor` was written to (bumps `_version`; nothing for an inference tensor). 0, or -1 with an
 * exception. */
int view_bump_version(const module_state *state, PyObject *tensor);

extern PyMethodDef view_methods[]; /* describe */

#endif
