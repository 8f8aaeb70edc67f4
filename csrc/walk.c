/* walk.c: walks over the live `_modules` dicts, and the switches for all tuner layers of a model.
 *
 * The walk visits what model.modules() visits, in its order, each module once, but leaves out the adapter containers of
 * tuner layers (they may hold thousands of adapters and hold no tuner layers). It keeps nothing between two calls. */
#include "walk.h"

#include "layer.h"
#include "grads.h"

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
    PyObject *plain;         /* nn.Module.named_modules, to tell classes that override it (owned) */
    PyTypeObject *last_type; /* the class asked about last, and the answer */
    int last_plain;
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

/* Whether the children are those in `_modules`: the class has nn.Module's named_modules, or is a tuner layer. */
static int plain_class(walk *self, PyObject *module) {
    PyTypeObject *type = Py_TYPE(module);
    if (type == self->last_type) return self->last_plain;
    PyObject *own = PyObject_GetAttr((PyObject *)type, self->state->names.named_modules);
    if (own == NULL) PyErr_Clear();
    self->last_type = type;
    self->last_plain = own == self->plain || PyType_IsSubtype(type, (PyTypeObject *)self->state->types.LayerBase);
    Py_XDECREF(own);
    return self->last_plain;
}

/* The two tuples of container names of a tuner layer. */
typedef struct {
    PyObject *lists[2]; /* owned, or NULL: not read yet */
} container_names;

/* 1 if the tuner layer `layer` lists `name` in adapter_layer_names or other_param_names. */
static int is_container(const walk *self, PyObject *layer, container_names *names, PyObject *name) {
    PyObject *const attributes[] = {self->state->names.adapter_layer_names, self->state->names.other_param_names};
    for (int i = 0; i < 2; i++) {
        if (names->lists[i] == NULL) {
            PyObject *list = PyObject_GetAttr(layer, attributes[i]);
            names->lists[i] = list ? PySequence_Tuple(list) : NULL;
            Py_XDECREF(list);
            if (names->lists[i] == NULL) return -1;
        }
        for (Py_ssize_t k = PyTuple_Size(names->lists[i]); k-- > 0;) {
            if (PyTuple_GetItem(names->lists[i], k) == name) return 1; /* both are interned as a rule */
        }
    }
    const int found = PySequence_Contains(names->lists[0], name);
    return found ? found : PySequence_Contains(names->lists[1], name);
}

/* Pushes the children of a module, the last first. */
static int push_children(walk *self, PyObject *module, PyObject *children) {
    const int layer = PyType_IsSubtype(Py_TYPE(module), (PyTypeObject *)self->state->types.LayerBase);
    const size_t start = self->depth;
    container_names names = {{NULL, NULL}};
    Py_ssize_t position = 0;
    PyObject *name, *child;
    int rc = 0;
    while (rc >= 0 && PyDict_Next(children, &position, &name, &child)) {
        PyObject *const type = (PyObject *)Py_TYPE(child);
        if (child == Py_None) continue;
        rc = 0;
        if (layer && (type == self->state->objects.ModuleDict || type == self->state->objects.ParameterDict)) {
            rc = is_container(self, module, &names, name);
        }
        if (rc == 0) rc = push(self, child);
    }
    for (size_t low = start, high = self->depth; low + 1 < high; low++) {
        PyObject *const swapped = self->stack[--high];
        self->stack[high] = self->stack[low];
        self->stack[low] = swapped;
    }
    Py_XDECREF(names.lists[0]);
    Py_XDECREF(names.lists[1]);
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
    PyObject *dict = PyObject_GenericGetDict(module, NULL);
    if (dict == NULL) return -1;
    PyObject *children = PyDict_GetItemWithError(dict, self->state->names._modules);
    int rc = -1;
    if (children != NULL && PyDict_Check(children) && plain_class(self, module)) {
        Py_INCREF(children);
        rc = PyDict_Size(children) ? push_children(self, module, children) : 0;
        Py_DECREF(children);
    } else if (!PyErr_Occurred()) {
        rc = own_walk(self, module);
    }
    Py_DECREF(dict);
    return rc;
}

static int walk_run(walk *self, PyObject *root) {
    self->plain = PyObject_GetAttr(self->state->objects.Module, self->state->names.named_modules);
    int rc = self->plain ? push(self, root) : -1;
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
    Py_XDECREF(self->plain);
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

typedef int (*layer_switch)(const module_state *state, journal *log, PyObject *layer, PyObject *names, int flag);

static int switch_enabled(const module_state *state, journal *log, PyObject *layer, PyObject *names, int flag) {
    (void)names;
    return layer_enable_adapters(state, log, layer, flag);
}

/* Applies `act` to every layer of a list; takes everything back if one fails. */
static PyObject *switch_all(PyObject *module, layer_switch act, PyObject *layers, PyObject *names, PyObject *flag) {
    const module_state *state = state_of(module);
    journal log = {0};
    int rc = PyList_Check(layers) ? 0 : -1;
    const int value = PyObject_IsTrue(flag);
    if (rc < 0) PyErr_SetString(PyExc_TypeError, "expected a list of tuner layers");
    if (value < 0) rc = -1;
    for (Py_ssize_t i = 0; rc == 0 && i < PyList_Size(layers); i++) {
        PyObject *layer = PyList_GetItem(layers, i);
        Py_INCREF(layer);
        rc = act(state, &log, layer, names, value);
        Py_DECREF(layer);
    }
    if (rc < 0) journal_undo(state, &log);
    journal_free(&log);
    if (rc < 0) return NULL;
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
    return switch_all(module, switch_enabled, args[0], NULL, args[1]);
}

static PyObject *walk_set_requires_grad(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    if (expect("set_requires_grad", count, 3) < 0) return NULL;
    return switch_all(module, layer_set_requires_grad, args[0], args[1], args[2]);
}

/* flags(layer, also, skip): [(tensor, requires_grad)], see grads_list() */
static PyObject *walk_flags(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    if (expect("flags", count, 3) < 0) return NULL;
    PyObject *dict = PyObject_GenericGetDict(args[0], NULL), *list = dict ? PyList_New(0) : NULL;
    PyObject *also = list ? PySequence_List(args[1]) : NULL, *skip = also ? PySet_New(args[2]) : NULL;
    if (skip == NULL || grads_list(state_of(module), args[0], dict, also, skip, list) < 0) Py_CLEAR(list);
    Py_XDECREF(dict);
    Py_XDECREF(also);
    Py_XDECREF(skip);
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
