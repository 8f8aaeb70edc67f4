/* walk.c: walks over the live `_modules` dicts, and the switches for all tuner layers of a model.
 *
 * The walk visits what model.modules() visits, in its order, each module once, but leaves out the adapter containers of
 * tuner layers (they may hold thousands of adapters and hold no tuner layers). It keeps nothing between two calls. */
#include "walk.h"

#include "layer.h"

/* --- modules seen, in order --- */

typedef struct {
    PyObject **slots; /* open addressing by address; borrowed from `order` */
    size_t mask;
    PyObject **order; /* strong references */
    size_t count;
} module_set;

static size_t slot_of(const module_set *set, const PyObject *object) {
    size_t at = ((uintptr_t)object >> 4) * (size_t)0x9E3779B97F4A7C15u;
    for (at = (at >> 20) & set->mask; set->slots[at] != NULL && set->slots[at] != object;) at = (at + 1) & set->mask;
    return at;
}

static int set_grow(module_set *set) {
    const size_t mask = set->slots ? 2 * set->mask + 1 : 4095;
    PyObject **slots = PyMem_Calloc(mask + 1, sizeof *slots);
    PyObject **order = PyMem_Realloc(set->order, (mask / 2 + 1) * sizeof *order);
    if (order != NULL) set->order = order;
    if (slots == NULL || order == NULL) {
        PyMem_Free(slots);
        PyErr_NoMemory();
        return -1;
    }
    PyMem_Free(set->slots);
    set->slots = slots;
    set->mask = mask;
    for (size_t i = 0; i < set->count; i++) set->slots[slot_of(set, set->order[i])] = set->order[i];
    return 0;
}

/* 1: added; 0: was there; -1: no memory. */
static int set_add(module_set *set, PyObject *object) {
    if (2 * set->count > set->mask || set->slots == NULL) {
        if (set_grow(set) < 0) return -1;
    }
    const size_t at = slot_of(set, object);
    if (set->slots[at] != NULL) return 0;
    Py_INCREF(object);
    set->slots[at] = set->order[set->count++] = object;
    return 1;
}

static void set_free(module_set *set) {
    for (size_t i = 0; i < set->count; i++) Py_DECREF(set->order[i]);
    PyMem_Free(set->order);
    PyMem_Free(set->slots);
}

/* --- the walk --- */

typedef struct {
    const module_state *state;
    class_table classes;
    module_set seen;
    PyObject **stack; /* strong references: modules to visit, the next one last */
    size_t depth, capacity;
} walk;

static int push(walk *self, PyObject *object) {
    if (self->depth == self->capacity) {
        const size_t capacity = self->capacity ? 2 * self->capacity : 256;
        PyObject **stack = PyMem_Realloc(self->stack, capacity * sizeof *stack);
        if (stack == NULL) {
            PyErr_NoMemory();
            return -1;
        }
        self->stack = stack;
        self->capacity = capacity;
    }
    Py_INCREF(object);
    self->stack[self->depth++] = object;
    return 0;
}

/* The names of a tuner layer's adapter containers: a new reference to a set. */
static PyObject *container_names(const walk *self, const class_facts *facts, PyObject *layer, PyObject *dict) {
    PyObject *own = layer_attribute(self->state, facts, layer, dict, LAYER_NAMES), *result = NULL;
    PyObject *others = own ? layer_attribute(self->state, facts, layer, dict, PARAM_NAMES) : NULL;
    if (others != NULL && own == facts->attributes[LAYER_NAMES] && others == facts->attributes[PARAM_NAMES]) {
        result = Py_NewRef(facts->containers);
    } else if (others != NULL && (result = PySet_New(own)) != NULL) {
        PyObject *done = PyObject_CallMethod(result, "update", "(O)", others);
        if (done == NULL) Py_CLEAR(result);
        Py_XDECREF(done);
    }
    Py_XDECREF(own);
    Py_XDECREF(others);
    return result;
}

/* Pushes the children of a module, the last first. */
static int push_children(walk *self, const class_facts *facts, PyObject *module, PyObject *dict, PyObject *children) {
    const size_t start = self->depth;
    Py_ssize_t position = 0;
    PyObject *containers = facts->layer ? container_names(self, facts, module, dict) : NULL, *name, *child;
    int rc = facts->layer && containers == NULL ? -1 : 0;
    while (rc >= 0 && PyDict_Next(children, &position, &name, &child)) {
        PyObject *const type = (PyObject *)Py_TYPE(child);
        if (child == Py_None) continue;
        rc = 0;
        if (containers && (type == self->state->objects.ModuleDict || type == self->state->objects.ParameterDict)) {
            rc = PySet_Contains(containers, name);
        }
        if (rc == 0) rc = push(self, child);
    }
    for (size_t low = start, high = self->depth; low + 1 < high; low++) {
        PyObject *const swapped = self->stack[--high];
        self->stack[high] = self->stack[low];
        self->stack[low] = swapped;
    }
    Py_XDECREF(containers);
    return rc < 0 ? -1 : 0;
}

/* A class with its own idea of its modules: asks module.modules(). */
static int own_walk(walk *self, PyObject *module) {
    PyObject *all = PyObject_CallMethod(module, "modules", NULL);
    PyObject *iterator = all ? PyObject_GetIter(all) : NULL, *child;
    int rc = iterator ? 0 : -1;
    while (rc == 0 && (child = PyIter_Next(iterator)) != NULL) {
        if (set_add(&self->seen, child) < 0) rc = -1;
        Py_DECREF(child);
    }
    Py_XDECREF(iterator);
    Py_XDECREF(all);
    return rc < 0 || PyErr_Occurred() ? -1 : 0;
}

static int visit_module(walk *self, PyObject *module) {
    const int added = set_add(&self->seen, module);
    if (added <= 0) return added;
    const class_facts *facts = class_of(self->state, &self->classes, Py_TYPE(module));
    PyObject *dict = facts ? PyObject_GenericGetDict(module, NULL) : NULL;
    if (dict == NULL) return -1;
    PyObject *children = PyDict_GetItemWithError(dict, self->state->names._modules);
    int rc = -1;
    if (children != NULL && PyDict_Check(children) && facts->plain) {
        Py_INCREF(children);
        rc = PyDict_Size(children) ? push_children(self, facts, module, dict, children) : 0;
        Py_DECREF(children);
    } else if (!PyErr_Occurred()) {
        rc = own_walk(self, module);
    }
    Py_DECREF(dict);
    return rc;
}

static int walk_run(walk *self, PyObject *root) {
    int rc = push(self, root);
    while (rc == 0 && self->depth > 0) {
        PyObject *module = self->stack[--self->depth];
        rc = visit_module(self, module) < 0 ? -1 : 0;
        Py_DECREF(module);
    }
    return rc;
}

static void walk_free(walk *self) {
    while (self->depth > 0) Py_DECREF(self->stack[--self->depth]);
    PyMem_Free(self->stack);
    set_free(&self->seen);
    class_table_free(&self->classes);
}

/* --- find(model, *classes) --- */

/* 1 if object is an instance of `kind`, a class or a tuple of classes. Classes registered with ABC.register are not
 * asked: a tuner layer inherits from its base. */
static int is_a(PyObject *object, PyObject *kind) {
    if (PyType_Check(kind)) return PyType_IsSubtype(Py_TYPE(object), (PyTypeObject *)kind);
    if (!PyTuple_Check(kind)) {
        PyErr_Format(PyExc_TypeError, "find() takes classes and tuples of classes, got %R", kind);
        return -1;
    }
    int match = 0;
    for (Py_ssize_t i = 0; match == 0 && i < PyTuple_Size(kind); i++) match = is_a(object, PyTuple_GetItem(kind, i));
    return match;
}

static PyObject *walk_find(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    walk self = {.state = state_of(module)};
    PyObject *result = NULL;
    if (count < 2) {
        PyErr_SetString(PyExc_TypeError, "find() takes a module and at least one class");
        return NULL;
    }
    if (walk_run(&self, args[0]) < 0) goto done;
    if ((result = PyTuple_New(count - 1)) == NULL) goto done;
    for (Py_ssize_t k = 1; k < count; k++) {
        PyObject *list = PyList_New(0);
        if (list == NULL || PyTuple_SetItem(result, k - 1, list) < 0) goto failed;
        for (size_t i = 0; i < self.seen.count; i++) {
            const int match = is_a(self.seen.order[i], args[k]);
            if (match < 0 || (match && PyList_Append(list, self.seen.order[i]) < 0)) goto failed;
        }
    }
    goto done;
failed:
    Py_CLEAR(result);
done:
    walk_free(&self);
    return result;
}

/* --- the switches, on a list of layers --- */

typedef int (*layer_switch)(switch_call *call, PyObject *layer, PyObject *names, int flag);

/* Applies `act` to every layer of a list; takes everything back if one fails. */
static PyObject *switch_all(PyObject *module, layer_switch act, PyObject *layers, PyObject *names, PyObject *flag) {
    switch_call call = {.state = state_of(module)};
    int rc = PyList_Check(layers) ? 0 : -1;
    const int value = PyObject_IsTrue(flag);
    if (rc < 0) PyErr_SetString(PyExc_TypeError, "expected a list of tuner layers");
    if (value < 0 || (rc == 0 && names != NULL && switch_names(&call, names) < 0)) rc = -1;
    for (Py_ssize_t i = 0; rc == 0 && i < PyList_Size(layers); i++) {
        PyObject *layer = PyList_GetItem(layers, i);
        Py_INCREF(layer);
        rc = act(&call, layer, names, value);
        Py_DECREF(layer);
    }
    if (switch_end(&call, rc) < 0) return NULL;
    Py_RETURN_NONE;
}

/* 0 if the call has `wanted` arguments. */
static int expect(const char *name, Py_ssize_t count, Py_ssize_t wanted) {
    if (count == wanted) return 0;
    PyErr_Format(PyExc_TypeError, "%s() takes %zd arguments, got %zd", name, wanted, count);
    return -1;
}

static PyObject *walk_set_adapter(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    if (expect("set_adapter", count, 3) < 0) return NULL;
    return switch_all(module, layer_set_adapter, args[0], args[1], args[2]);
}

static PyObject *walk_enable_adapters(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    if (expect("enable_adapters", count, 2) < 0) return NULL;
    return switch_all(module, layer_enable_adapters, args[0], NULL, args[1]);
}

static PyObject *walk_set_requires_grad(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    if (expect("set_requires_grad", count, 3) < 0) return NULL;
    return switch_all(module, layer_set_requires_grad, args[0], args[1], args[2]);
}

/* flags(layer, also, skip): [(tensor, requires_grad)], see grads_list() */
static PyObject *walk_flags(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    if (expect("flags", count, 3) < 0) return NULL;
    switch_call call = {.state = state_of(module)};
    PyObject *dict = PyObject_GenericGetDict(args[0], NULL), *list = dict ? PyList_New(0) : NULL;
    PyObject *skip = list ? PySet_New(args[2]) : NULL;
    const class_facts *facts = skip ? class_of(call.state, &call.classes, Py_TYPE(args[0])) : NULL;
    if (facts == NULL || switch_names(&call, args[1]) < 0 || grads_list(&call, facts, args[0], dict, skip, list) < 0) {
        Py_CLEAR(list);
    }
    Py_XDECREF(dict);
    Py_XDECREF(skip);
    switch_end(&call, 0);
    return list;
}

#define METHOD(name, doc) \
    { #name, (PyCFunction)(void (*)(void))walk_##name, METH_FASTCALL, doc }

PyMethodDef walk_methods[] = {
    METHOD(find,
           "find($module, model, /, *classes)\n--\n\n"
           "For each class (or tuple of classes) the list of its instances among model.modules(), in that order,\n"
           "leaving out what lies in the adapter containers of tuner layers."),
    METHOD(set_adapter, "set_adapter($module, layers, names, inference_mode, /)\n--\n\n"
                        "layer.set_adapter(names, inference_mode) for every layer of a list: all or none."),
    METHOD(enable_adapters, "enable_adapters($module, layers, enabled, /)\n--\n\n"
                            "layer.enable_adapters(enabled) for every layer of a list: all or none."),
    METHOD(set_requires_grad, "set_requires_grad($module, layers, names, requires_grad, /)\n--\n\n"
                              "layer.set_requires_grad(names, requires_grad) for every layer of a list: all or none."),
    METHOD(flags,
           "flags($module, layer, also, skip, /)\n--\n\n"
           "[(tensor, requires_grad)] of a layer's adapter weights that may be trainable and of the adapters in\n"
           "also, without those in skip. It does not grow with the number of frozen adapters."),
    {NULL, NULL, 0, NULL},
};
