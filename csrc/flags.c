/* flags.c: see flags.h. */
#include "flags.h"

/* Whether the tensor's class has torch.Tensor's own requires_grad. */
static int is_direct(const module_state *state, PyObject *tensor) {
    PyObject *const type = (PyObject *)Py_TYPE(tensor);
    return (type == state->objects.Parameter || type == state->objects.Tensor) && state->requires_grad_get != NULL &&
           state->requires_grad_set != NULL;
}

/* 1 or 0: the flag of a tensor; -1 with an exception. */
static int flag_of(const module_state *state, PyObject *tensor, int direct) {
    PyObject *flag = direct
                         ? state->requires_grad_get(state->objects.requires_grad, tensor, (PyObject *)Py_TYPE(tensor))
                         : PyObject_GetAttr(tensor, state->names.requires_grad);
    const int value = flag == Py_True ? 1 : flag == Py_False ? 0 : flag == NULL ? -1 : PyObject_IsTrue(flag);
    Py_XDECREF(flag);
    return value;
}

/* After a flag could not be cleared: 0 and no exception if the tensor is the result of a computation, which keeps it. */
static int excuse(const module_state *state, PyObject *tensor) {
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    PyObject *leaf = PyObject_GetAttr(tensor, state->names.is_leaf);
    const int is_leaf = leaf ? PyObject_IsTrue(leaf) : -1;
    Py_XDECREF(leaf);
    if (is_leaf != 0) {
        PyErr_Restore(type, value, trace);
        return -1;
    }
    Py_XDECREF(type);
    Py_XDECREF(value);
    Py_XDECREF(trace);
    return 0;
}

static int tensor_list(const visitor *self, PyObject *tensor, int flag) {
    PyObject *pair = PyTuple_Pack(2, tensor, flag ? Py_True : Py_False);
    const int rc = pair ? PyList_Append(self->list, pair) : -1;
    Py_XDECREF(pair);
    return rc < 0 ? -1 : flag;
}

/* The flag that the tensor had, or -1 with an exception. */
static int tensor_visit(const visitor *self, PyObject *tensor) {
    const module_state *state = self->state;
    const int direct = is_direct(state, tensor), old = flag_of(state, tensor, direct);
    if (old < 0 || old == self->act) return old;
    if (self->act == LIST) return tensor_list(self, tensor, old);
    PyObject *const flag = old ? Py_False : Py_True;
    const int failed = direct ? state->requires_grad_set(state->objects.requires_grad, tensor, flag)
                              : PyObject_SetAttr(tensor, state->names.requires_grad, flag);
    if (failed) return old && excuse(state, tensor) == 0 ? old : -1;
    return journal_add(self->log, tensor, NULL, old ? Py_True : Py_False) < 0 ? -1 : old;
}

static int iterable_visit(const visitor *self, PyObject *iterable) {
    PyObject *iterator = PyObject_GetIter(iterable), *tensor;
    if (iterator == NULL) return -1;
    int any = 0;
    while (any >= 0 && (tensor = PyIter_Next(iterator)) != NULL) {
        const int old = tensor_visit(self, tensor);
        any = old < 0 ? -1 : any | old;
        Py_DECREF(tensor);
    }
    Py_DECREF(iterator);
    return PyErr_Occurred() ? -1 : any;
}

/* The parameters of a module without children, such as nn.Linear. */
static int dict_visit(const visitor *self, PyObject *parameters) {
    Py_ssize_t position = 0;
    PyObject *key, *tensor;
    int any = 0;
    while (any >= 0 && PyDict_Next(parameters, &position, &key, &tensor)) {
        if (tensor == Py_None) continue;
        Py_INCREF(tensor);
        const int old = tensor_visit(self, tensor);
        any = old < 0 ? -1 : any | old;
        Py_DECREF(tensor);
    }
    return any;
}

int entry_visit(const visitor *self, PyObject *entry) {
    const module_state *state = self->state;
    PyObject *const type = (PyObject *)Py_TYPE(entry);
    if (type == state->objects.Parameter) return tensor_visit(self, entry);
    if (type != state->objects.Linear) {
        const int tensor = PyObject_IsInstance(entry, state->objects.Tensor);
        if (tensor != 0) return tensor < 0 ? -1 : tensor_visit(self, entry);
    }
    int any = -1;
    PyObject *dict = PyObject_GenericGetDict(entry, NULL), *parameters = NULL, *modules = NULL, *values = NULL;
    if (dict == NULL) PyErr_Clear();
    if (dict != NULL) parameters = PyDict_GetItemWithError(dict, state->names._parameters);
    if (parameters != NULL) modules = PyDict_GetItemWithError(dict, state->names._modules);
    Py_XINCREF(parameters);
    if (modules != NULL && PyDict_CheckExact(modules) && PyDict_Size(modules) == 0 && PyDict_CheckExact(parameters)) {
        any = dict_visit(self, parameters);
    } else if (!PyErr_Occurred() && (values = PyObject_CallMethod(entry, "parameters", NULL)) != NULL) {
        any = iterable_visit(self, values);
    }
    Py_XDECREF(values);
    Py_XDECREF(parameters);
    Py_XDECREF(dict);
    return any;
}

int names_visit(const visitor *self, const containers *all, PyObject *names, char *trainable) {
    int rc = 0;
    for (Py_ssize_t i = 0, count = PyTuple_Size(names); rc >= 0 && i < count; i++) {
        PyObject *const name = PyTuple_GetItem(names, i);
        for (int k = 0; rc >= 0 && k < all->count; k++) {
            PyObject *entry = all->sizes[k] ? container_get(&all->items[k], name) : NULL;
            rc = entry ? entry_visit(self, entry) : PyErr_Occurred() ? -1 : 0;
            Py_XDECREF(entry);
            if (trainable != NULL) trainable[i * all->count + k] = rc > 0;
        }
    }
    return rc < 0 ? -1 : 0;
}
