/* work.c: see work.h. */
#include "work.h"

int work_add(worklist *work, PyObject *entry, int act, char *note) {
    if (work->count == work->capacity) {
        const size_t capacity = work->capacity ? 4 * work->capacity : 1024;
        work_item *items = PyMem_Realloc(work->items, capacity * sizeof *items);
        if (items == NULL) {
            PyErr_NoMemory();
            Py_DECREF(entry);
            return -1;
        }
        work->items = items;
        work->capacity = capacity;
    }
    PREFETCH(entry);
    work->items[work->count++] = (work_item){.object = entry, .note = note, .act = act};
    return 0;
}

void work_free(worklist *work) {
    for (size_t i = 0; i < work->count; i++) {
        Py_DECREF(work->items[i].object);
        Py_XDECREF(work->items[i].dict);
        Py_XDECREF(work->items[i].modules);
    }
    PyMem_Free(work->items);
}

/* --- from entries to tensors --- */

/* 1 if an entry is a tensor, 0 if not, -1 with an exception. */
static int is_tensor(const module_state *state, PyObject *entry) {
    PyObject *const type = (PyObject *)Py_TYPE(entry);
    if (type == state->objects.Parameter) return 1;
    return type == state->objects.Linear ? 0 : PyObject_IsInstance(entry, state->objects.Tensor);
}

/* Replaces the __dict__ of a module by its parameters, or by NULL where they are no dict; finds its modules as well. */
static int find_parameters(const module_state *state, worklist *work, work_item *item) {
    PyObject *dict = item->dict, *parameters = dict_get(dict, state->names._parameters, &work->hints[PARAMETERS]);
    PyObject *modules = parameters ? dict_get(dict, state->names._modules, &work->hints[MODULES]) : NULL;
    const int plain = modules != NULL && PyDict_CheckExact(modules) && PyDict_CheckExact(parameters);
    item->dict = plain ? Py_NewRef(parameters) : NULL;
    item->modules = plain ? Py_NewRef(modules) : NULL;
    if (plain) {
        __builtin_prefetch(parameters);
        __builtin_prefetch(modules);
    }
    Py_DECREF(dict);
    return modules == NULL && PyErr_Occurred() ? -1 : 0;
}

/* Adds the tensors of one entry: itself, its parameters, or what it calls so. */
static int add_tensors(const work_item *item, int tensor, worklist *tensors) {
    if (tensor) return work_add(tensors, Py_NewRef(item->object), item->act, item->note);
    PyObject *key, *value;
    int rc = 0;
    if (item->dict != NULL && PyDict_Size(item->modules) == 0) { /* such as nn.Linear */
        Py_ssize_t position = 0, left = PyDict_Size(item->dict);
        while (rc == 0 && left-- > 0 && PyDict_Next(item->dict, &position, &key, &value)) {
            if (value != Py_None) rc = work_add(tensors, Py_NewRef(value), item->act, item->note);
        }
        return rc;
    }
    PyObject *all = PyObject_CallMethod(item->object, "parameters", NULL),
             *iterator = all ? PyObject_GetIter(all) : NULL;
    while (rc == 0 && iterator != NULL && (value = PyIter_Next(iterator)) != NULL) {
        rc = work_add(tensors, value, item->act, item->note);
    }
    Py_XDECREF(all);
    Py_XDECREF(iterator);
    return rc < 0 || PyErr_Occurred() ? -1 : 0;
}

/* Appends the tensors of all entries; `asked`: what that reads was asked for before. */
static int find_tensors(const module_state *state, worklist *work, bool asked, worklist *tensors) {
    for (size_t i = 0; i < work->count; i++) {
        work_item *const item = &work->items[i];
        if ((item->old = is_tensor(state, item->object)) < 0) return -1;
        if (item->old || (item->dict = PyObject_GenericGetDict(item->object, NULL)) != NULL) {
            PREFETCH(item->old ? item->object : item->dict);
        } else {
            PyErr_Clear(); /* an object without one: asked below */
        }
    }
    for (size_t i = 0; !asked && i < work->count; i++) {
        if (work->items[i].dict == NULL) continue;
        prefetch_item(work->items[i].dict, work->hints[PARAMETERS].at);
        prefetch_item(work->items[i].dict, work->hints[MODULES].at);
    }
    for (size_t i = 0; i < work->count; i++) {
        if (work->items[i].dict != NULL && find_parameters(state, work, &work->items[i]) < 0) return -1;
    }
    for (size_t i = 0; !asked && i < work->count; i++) {
        if (work->items[i].dict != NULL) prefetch_item(work->items[i].dict, 0);
    }
    for (size_t i = 0; i < work->count; i++) {
        if (add_tensors(&work->items[i], work->items[i].old, tensors) < 0) return -1;
    }
    return 0;
}

/* --- flags --- */

/* Whether the tensor's class has torch.Tensor's own requires_grad. */
static int is_direct(const module_state *state, PyObject *tensor) {
    PyObject *const type = (PyObject *)Py_TYPE(tensor);
    return (type == state->objects.Parameter || type == state->objects.Tensor) && state->requires_grad_get != NULL &&
           state->requires_grad_set != NULL;
}

/* 1 or 0: the flag of a tensor; -1 with an exception. */
static int flag_of(const module_state *state, PyObject *tensor) {
    PyObject *flag = is_direct(state, tensor)
                         ? state->requires_grad_get(state->objects.requires_grad, tensor, (PyObject *)Py_TYPE(tensor))
                         : PyObject_GetAttr(tensor, state->names.requires_grad);
    const int value = flag ? PyObject_IsTrue(flag) : -1;
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

static int turn(const module_state *state, journal *log, PyObject *tensor, int act, int old) {
    PyObject *const flag = act == ON ? Py_True : Py_False;
    const int failed = is_direct(state, tensor) ? state->requires_grad_set(state->objects.requires_grad, tensor, flag)
                                                : PyObject_SetAttr(tensor, state->names.requires_grad, flag);
    if (failed) return act == OFF ? excuse(state, tensor) : -1;
    return journal_add(log, tensor, NULL, old ? Py_True : Py_False);
}

/* Does one tensor, whose flag was read before those above it in the list were turned, if any was. */
static int do_item(const module_state *state, journal *log, work_item *item, int turned, PyObject *list) {
    if (item->old && item->note != NULL) *item->note = 1;
    if (item->act == LIST) {
        PyObject *pair = PyTuple_Pack(2, item->object, item->old ? Py_True : Py_False);
        const int rc = pair ? PyList_Append(list, pair) : -1;
        Py_XDECREF(pair);
        return rc;
    }
    if (turned && item->old == item->act) item->old = flag_of(state, item->object); /* it may be in the list twice */
    if (item->old < 0 || item->old == item->act) return item->old < 0 ? -1 : 0;
    return turn(state, log, item->object, item->act, item->old);
}

/* where in a tensor and in what torch has about it things are, in words or bytes */
enum { TORCH = 2, AUTOGRAD = 3, DTYPE = 160, GRAD_FN = 48, FLAG = 128, FEW = 8 };

/* Whether what torch has about many tensors is where it is thought to be: in the first one it is where torch says. */
static bool is_usual(const module_state *state, const worklist *tensors) {
    if (tensors->count < FEW || !is_direct(state, tensors->items[0].object)) return false;
    PyObject *const first = tensors->items[0].object, *address = PyObject_GetAttr(first, state->names._cdata);
    const void *known = address ? PyLong_AsVoidPtr(address) : NULL;
    Py_XDECREF(address);
    PyErr_Clear();
    return known == word_of(first, TORCH);
}

/* Where torch keeps the flags of a tensor, or NULL; `first` is one whose place is known. */
static const char *flags_of(const PyObject *tensor, const PyObject *first) {
    const char *const own = Py_TYPE(tensor) == Py_TYPE(first) ? word_of(tensor, TORCH) : NULL;
    return own ? word_of((const void *)own, AUTOGRAD) : NULL;
}

/* Asks for what torch has about many tensors, and in that for their flags. */
static void prefetch_flags(const module_state *state, const worklist *tensors) {
    if (!is_usual(state, tensors)) return;
    for (size_t i = 0; i < tensors->count; i++) {
        __builtin_prefetch(word_of(tensors->items[i].object, TORCH) + sizeof(char *) * AUTOGRAD);
        __builtin_prefetch(word_of(tensors->items[i].object, TORCH) + DTYPE);
    }
    for (size_t i = 0; i < tensors->count; i++) {
        const char *const flags = flags_of(tensors->items[i].object, tensors->items[0].object);
        if (flags == NULL) continue;
        __builtin_prefetch(flags);
        __builtin_prefetch(flags + GRAD_FN);
        __builtin_prefetch(flags + FLAG);
    }
}

/* Notes what doing a list read, entry by entry. */
static void trace_list(const module_state *state, const worklist *work, const worklist *tensors) {
    const bool usual = is_usual(state, tensors);
    footprint *const lines = work->past;
    size_t next = 0;
    lines->count = 0;
    for (size_t i = 0; i < work->count; i++) {
        const work_item *const item = &work->items[i];
        PyObject *dict = item->dict ? PyObject_GenericGetDict(item->object, NULL) : NULL;
        trace_add(lines, (const char *)item->object - 32); /* where its __dict__ is */
        trace_object(lines, item->object);
        if (dict != NULL) {
            trace_item(lines, dict, work->hints[PARAMETERS].at);
            trace_add(lines, item_of(dict, work->hints[MODULES].at));
            trace_item(lines, item->dict, 0);
            trace_object(lines, item->modules);
            Py_DECREF(dict);
        }
        for (; next < tensors->count * (i + 1) / work->count; next++) {
            PyObject *const tensor = tensors->items[next].object;
            const char *const flags = usual ? flags_of(tensor, tensors->items[0].object) : NULL;
            trace_object(lines, tensor);
            if (flags == NULL) continue;
            trace_add(lines, word_of(tensor, TORCH) + sizeof flags * AUTOGRAD);
            trace_add(lines, word_of(tensor, TORCH) + DTYPE);
            trace_add(lines, flags);
            trace_add(lines, flags + GRAD_FN);
            trace_add(lines, flags + FLAG);
        }
    }
    PyErr_Clear();
}

int work_run(const module_state *state, journal *log, worklist *work, PyObject *list) {
    worklist tensors = {0};
    uintptr_t of = 0;
    for (size_t i = 0; i < work->count; i++) of += (uintptr_t)work->items[i].object;
    const bool asked = work->past != NULL && work->past->of == of;
    int rc = find_tensors(state, work, asked, &tensors);
    if (!asked) prefetch_flags(state, &tensors);
    const size_t turned = log->count;
    for (size_t i = 0; rc == 0 && i < tensors.count; i++) {
        if ((tensors.items[i].old = flag_of(state, tensors.items[i].object)) < 0) rc = -1;
    }
    for (size_t i = 0; rc == 0 && i < tensors.count; i++) {
        rc = do_item(state, log, &tensors.items[i], log->count > turned, list);
    }
    if (rc == 0 && work->past != NULL && !asked) {
        trace_list(state, work, &tensors);
        work->past->of = of;
    }
    work_free(&tensors);
    return rc;
}
