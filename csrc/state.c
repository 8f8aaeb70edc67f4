/* state.c: fills, visits and clears the module state; the lists in state.h say with what. */
#define _DEFAULT_SOURCE /* madvise */
#include "state.h"

#include <stdlib.h>
#include <string.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

/* what is kept from one call to the next: bytes that were used, and bytes of addresses, most of them never touched */
enum { SPARE_MOST = 16 << 20, SPARE_ADDRESSES = 512 << 20 };

/* module.path (dots follow attributes). New reference, or NULL with an exception. */
static PyObject *object_fetch(const char *module, const char *path) {
    PyObject *object = PyImport_ImportModule(module);
    char name[64];
    while (object != NULL && *path != '\0') {
        const char *dot = strchr(path, '.');
        const size_t length = dot ? (size_t)(dot - path) : strlen(path);
        PyObject *next = NULL;
        if (length >= sizeof name) {
            PyErr_SetString(PyExc_SystemError, "attribute name too long in STATE_OBJECTS");
        } else {
            memcpy(name, path, length);
            name[length] = '\0';
            next = PyObject_GetAttrString(object, name);
        }
        Py_DECREF(object);
        object = next;
        path += length + (dot != NULL);
    }
    return object;
}

/* Replaces the current exception by an ImportError that says what torch lacks, keeping the cause. Returns -1. */
static int lacks(PyObject *torch, const char *module, const char *path) {
    PyObject *type = NULL, *value = NULL, *trace = NULL, *version = PyObject_GetAttrString(torch, "__version__");
    PyErr_Fetch(&type, &value, &trace);
    Py_XDECREF(type);
    Py_XDECREF(trace);
    PyErr_Format(PyExc_ImportError, "peft_c needs torch >= " TORCH_MINIMUM ": the installed torch %S lacks %s.%s (%S)",
                 version ? version : Py_None, module, path, value ? value : Py_None);
    Py_XDECREF(value);
    Py_XDECREF(version);
    return -1;
}

static PyObject *torch_import(void) {
    PyObject *torch = PyImport_ImportModule("torch");
    if (torch == NULL && PyErr_ExceptionMatches(PyExc_ModuleNotFoundError)) {
        PyErr_SetString(PyExc_ImportError,
                        "peft_c needs torch >= " TORCH_MINIMUM ", which is not installed: pip install torch");
    }
    return torch;
}

int state_init(module_state *state) {
    int rc = -1;
    PyObject *torch = torch_import();
    if (torch == NULL) goto done;
    if (torch_shim_bind(&state->torch, torch) < 0) goto done;
#define X(name) \
    if ((state->names.name = PyUnicode_InternFromString(#name)) == NULL) goto done;
    STATE_NAMES(X)
#undef X
#define X(field, module, path) \
    if ((state->objects.field = object_fetch(module, path)) == NULL) { \
        rc = lacks(torch, module, path); \
        goto done; \
    }
    STATE_OBJECTS(X)
#undef X
    PyTypeObject *const descriptor = Py_TYPE(state->objects.requires_grad);
    state->requires_grad_get = (descrgetfunc)(uintptr_t)PyType_GetSlot(descriptor, Py_tp_descr_get);
    state->requires_grad_set = (descrsetfunc)(uintptr_t)PyType_GetSlot(descriptor, Py_tp_descr_set);
    rc = 0;
done:
    Py_XDECREF(torch);
    return rc;
}

int state_traverse(const module_state *state, visitproc visit, void *arg) {
#define X(name) Py_VISIT(state->types.name);
    STATE_TYPES(X)
#undef X
#define X(field, module, path) Py_VISIT(state->objects.field);
    STATE_OBJECTS(X)
#undef X
    Py_VISIT(state->finish);
    Py_VISIT(state->linear);
    return 0;
}

void state_clear(module_state *state) {
#define X(name) Py_CLEAR(state->names.name);
    STATE_NAMES(X)
#undef X
#define X(name) Py_CLEAR(state->types.name);
    STATE_TYPES(X)
#undef X
#define X(field, module, path) Py_CLEAR(state->objects.field);
    STATE_OBJECTS(X)
#undef X
    Py_CLEAR(state->finish);
    Py_CLEAR(state->linear);
    free(state->spare.data);
    state->spare = (scratch){NULL, 0};
}

scratch scratch_take(module_state *state, size_t size) {
    scratch block = state->spare;
    state->spare = (scratch){NULL, 0};
    if (block.data == NULL || block.size < size) {
        free(block.data);
        block = (scratch){malloc(size + 1), size};
    }
    return block;
}

void scratch_give(module_state *state, scratch block, size_t used) {
    const bool small = used <= SPARE_MOST && block.size <= SPARE_ADDRESSES;
    if (block.data != NULL && small && block.size >= state->spare.size) {
        const scratch other = state->spare;
        state->spare = block;
        block = other;
    }
    free(block.data);
}

void ask_for_large_pages(void *data, size_t bytes) {
#ifdef MADV_HUGEPAGE
    const uintptr_t large = 1 << 21, begin = ((uintptr_t)data + large - 1) & ~(large - 1);
    const uintptr_t end = ((uintptr_t)data + bytes) & ~(large - 1);
    if (end > begin) (void)madvise((void *)begin, end - begin, MADV_HUGEPAGE);
#else
    (void)data, (void)bytes;
#endif
}
