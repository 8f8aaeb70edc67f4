/* walk.c: walks over the live `_modules` dicts, and the switches for all tuner layers of a model.
 *
 * The walk visits what model.modules() visits, in its order, each module once, but leaves out the adapter containers of
 * tuner layers (they may hold thousands of adapters and hold no tuner layers). It keeps nothing between two calls.
 *
 * It reads the tree level by level, each step for all modules of a level, so that the processor waits for many of them at
 * once instead of one after the other (see work.h), and then orders what it found. */
#include "walk.h"

#include "layer.h"

/* What was found in a `_modules`. */
struct found {
    PyObject *module; /* owned */
    int listed;       /* it has the name of an adapter container */
};

/* `items` with room for one more of `size` bytes, perhaps elsewhere; NULL with an exception, and `items` as they were. */
static void *with_room(void *items, size_t count, size_t *capacity, size_t size) {
    if (count < *capacity) return items;
    const size_t wanted = *capacity ? 2 * *capacity : 1024;
    void *bigger = PyMem_Realloc(items, wanted * size);
    if (bigger == NULL) return PyErr_NoMemory();
    *capacity = wanted;
    return bigger;
}

static size_t slot_of(const walk *self, const PyObject *module) {
    size_t at = (((uintptr_t)module >> 4) * (size_t)0x9E3779B97F4A7C15u >> 20) & self->slot_mask;
    while (self->slots[at] != 0 && self->nodes[self->slots[at] - 1].module != module) at = (at + 1) & self->slot_mask;
    return at;
}

static int grow_slots(walk *self) {
    const size_t mask = self->slots ? 2 * self->slot_mask + 1 : 2047;
    size_t *slots = PyMem_Calloc(mask + 1, sizeof *slots);
    if (slots == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    PyMem_Free(self->slots);
    self->slots = slots;
    self->slot_mask = mask;
    for (size_t i = 0; i < self->node_count; i++) self->slots[slot_of(self, self->nodes[i].module)] = i + 1;
    return 0;
}

/* Adds a module below the one that is read now, if it is none of its adapter containers. */
static int add_edge(walk *self, PyObject *module, int expand) {
    if (2 * self->node_count >= self->slot_mask && grow_slots(self) < 0) return -1;
    node *nodes = with_room(self->nodes, self->node_count, &self->node_capacity, sizeof *nodes);
    if (nodes != NULL) self->nodes = nodes;
    size_t *edges = with_room(self->edges, self->edge_count, &self->edge_capacity, sizeof *edges);
    if (edges != NULL) self->edges = edges;
    size_t *queue = with_room(self->queue, self->queue_count, &self->queue_capacity, sizeof *queue);
    if (queue != NULL) self->queue = queue;
    if (nodes == NULL || edges == NULL || queue == NULL) return -1;
    const size_t at = slot_of(self, module);
    if (self->slots[at] == 0) {
        self->nodes[self->node_count] = (node){.module = Py_NewRef(module)};
        self->slots[at] = ++self->node_count;
    }
    const size_t index = self->slots[at] - 1;
    self->edges[self->edge_count++] = index;
    if (expand && !self->nodes[index].queued) {
        self->nodes[index].queued = true;
        self->queue[self->queue_count++] = index;
    }
    return 0;
}

/* The names of a tuner layer's adapter containers: a new reference to a set. */
static PyObject *container_names(const walk *self, class_facts *facts, PyObject *layer, PyObject *dict) {
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

static int add_found(walk *self, PyObject *module, int listed) {
    struct found *row = with_room(self->row, self->row_count, &self->row_capacity, sizeof *row);
    if (row == NULL) return -1;
    self->row = row;
    PREFETCH(module);
    self->row[self->row_count++] = (struct found){Py_NewRef(module), listed};
    return 0;
}

/* 1 if child number `at` of a layer, called `name`, has the name of one of its containers `names`. */
static int is_listed(class_facts *facts, PyObject *names, PyObject *name, size_t at) {
    const int usual = names == facts->containers && at < CHILDREN;
    if (usual && facts->children[at] == name) return facts->listed[at];
    const int listed = PySet_Contains(names, name);
    if (usual && listed >= 0) {
        Py_XDECREF(facts->children[at]);
        facts->children[at] = Py_NewRef(name);
        facts->listed[at] = listed;
    }
    return listed;
}

/* Adds the children of a plain module to the row. */
static int read_children(walk *self, const node *parent, PyObject *children) {
    Py_ssize_t position = 0;
    const int layer = parent->facts->layer;
    PyObject *names = layer ? container_names(self, parent->facts, parent->module, parent->dict) : NULL, *name, *child;
    int rc = layer && names == NULL ? -1 : 0;
    for (size_t at = 0; rc == 0 && PyDict_Next(children, &position, &name, &child); at++) {
        if (child == Py_None) continue;
        const int listed = layer ? is_listed(parent->facts, names, name, at) : 0;
        rc = listed < 0 ? -1 : add_found(self, child, listed);
    }
    Py_XDECREF(names);
    return rc;
}

/* A class with its own idea of its modules: asks module.modules(). */
static int ask_modules(walk *self, PyObject *module) {
    PyObject *all = PyObject_CallMethod(module, "modules", NULL);
    PyObject *iterator = all ? PyObject_GetIter(all) : NULL, *child;
    int rc = iterator ? 0 : -1;
    while (rc == 0 && (child = PyIter_Next(iterator)) != NULL) {
        rc = add_found(self, child, 0);
        Py_DECREF(child);
    }
    Py_XDECREF(iterator);
    Py_XDECREF(all);
    return rc < 0 || PyErr_Occurred() ? -1 : 0;
}

/* Reads what lies below a module into the row. */
static int read_node(walk *self, node *parent) {
    PyObject *const children = parent->children;
    if (children == NULL || !PyDict_Check(children) || !parent->facts->plain) {
        parent->flat = true;
        return ask_modules(self, parent->module);
    }
    return PyDict_Size(children) ? read_children(self, parent, children) : 0;
}

static int look_at(walk *self, node *at) {
    if ((at->facts = class_of(self->state, &self->classes, Py_TYPE(at->module))) == NULL) return -1;
    if ((at->dict = PyObject_GenericGetDict(at->module, NULL)) == NULL) return -1;
    PREFETCH(at->dict);
    return 0;
}

/* Reads the modules in the queue from `start` to `end`; those below them are queued. */
static int read_level(walk *self, size_t start, size_t end) {
    const module_state *state = self->state;
    for (size_t i = start; i < end; i++) {
        if (look_at(self, &self->nodes[self->queue[i]]) < 0) return -1;
    }
    for (size_t i = start; i < end; i++) {
        node *const parent = &self->nodes[self->queue[i]];
        PyObject *children = dict_get(parent->dict, state->names._modules, &parent->facts->hints[MODULES]);
        if (children == NULL && PyErr_Occurred()) return -1;
        parent->children = Py_XNewRef(children);
        if (children != NULL) PREFETCH(children);
    }
    for (size_t i = start; i < end; i++) {
        node *const parent = &self->nodes[self->queue[i]];
        parent->first = self->row_count;
        if (read_node(self, parent) < 0) return -1;
        parent->count = self->row_count - parent->first;
    }
    size_t at = 0;
    for (size_t i = start; i < end; i++) {
        const size_t index = self->queue[i], last = self->nodes[index].first + self->nodes[index].count;
        const bool flat = self->nodes[index].flat;
        self->nodes[index].first = self->edge_count;
        for (; at < last; at++) {
            PyObject *const module = self->row[at].module, *const type = (PyObject *)Py_TYPE(module);
            if (self->row[at].listed && (type == state->objects.ModuleDict || type == state->objects.ParameterDict)) {
                continue;
            }
            if (add_edge(self, module, !flat) < 0) return -1;
        }
        self->nodes[index].count = self->edge_count - self->nodes[index].first;
    }
    for (size_t i = 0; i < self->row_count; i++) Py_DECREF(self->row[i].module);
    self->row_count = 0;
    return 0;
}

/* Puts the modules in the order in which model.modules() has them. */
static int put_in_order(walk *self) {
    size_t *stack = PyMem_Malloc((self->edge_count + 1) * sizeof *stack), depth = 0;
    self->order = PyMem_Malloc((self->node_count + 1) * sizeof *self->order);
    if (stack == NULL || self->order == NULL) {
        PyMem_Free(stack);
        PyErr_NoMemory();
        return -1;
    }
    stack[depth++] = 0;
    while (depth > 0) {
        node *const next = &self->nodes[stack[--depth]];
        if (next->seen) continue;
        next->seen = true;
        self->order[self->order_count++] = (size_t)(next - self->nodes);
        for (size_t i = 0; next->flat && i < next->count; i++) {
            node *const below = &self->nodes[self->edges[next->first + i]];
            if (!below->seen) self->order[self->order_count++] = self->edges[next->first + i];
            below->seen = true;
        }
        for (size_t i = next->flat ? 0 : next->count; i-- > 0;) stack[depth++] = self->edges[next->first + i];
    }
    PyMem_Free(stack);
    return 0;
}

int walk_run(walk *self, PyObject *root) {
    int rc = add_edge(self, root, 1);
    for (size_t start = 0; rc == 0 && start < self->queue_count;) {
        const size_t end = self->queue_count;
        rc = read_level(self, start, end);
        start = end;
    }
    for (size_t i = 0; rc == 0 && i < self->node_count; i++) { /* those whose children are not asked for */
        if (self->nodes[i].facts == NULL) rc = look_at(self, &self->nodes[i]);
    }
    return rc < 0 ? -1 : put_in_order(self);
}

void walk_free(walk *self) {
    for (size_t i = 0; i < self->node_count; i++) {
        if (i > 0 || !self->root_borrowed) Py_DECREF(self->nodes[i].module);
        Py_XDECREF(self->nodes[i].dict);
        Py_XDECREF(self->nodes[i].children);
    }
    for (size_t i = 0; i < self->row_count; i++) Py_DECREF(self->row[i].module);
    PyMem_Free(self->nodes);
    PyMem_Free(self->slots);
    PyMem_Free(self->edges);
    PyMem_Free(self->queue);
    PyMem_Free(self->order);
    PyMem_Free(self->row);
    class_table_free(&self->classes);
}

void walk_trace(const walk *self, footprint *lines) {
    for (size_t i = 1; i < self->queue_count; i++) {
        const node *at = &self->nodes[self->queue[i]];
        trace_add(lines, (const char *)at->module - 32); /* where its __dict__ is */
        trace_add(lines, at->module);
        trace_add(lines, at->dict);
        trace_add(lines, keys_of(at->dict));
        trace_add(lines, item_in(at->dict, at->facts->hints[MODULES].at, room_of(at->dict)));
        trace_add(lines, at->children);
        const Py_ssize_t size = PyDict_Size(at->children);
        if (size == 0) continue;
        trace_add(lines, keys_of(at->children));
        for (Py_ssize_t k = 0; k < size + 3; k += 4) trace_add(lines, item_of(at->children, k)); /* 4 items a line */
    }
}

/* --- finding --- */

/* 1 if `kind`, a class or a tuple of classes, is or has a base of `type`. Classes registered with ABC.register are not
 * asked: a tuner layer inherits from its base. */
static int is_a(PyTypeObject *type, PyObject *kind) {
    if (PyType_Check(kind)) return PyType_IsSubtype(type, (PyTypeObject *)kind);
    if (!PyTuple_Check(kind)) {
        PyErr_Format(PyExc_TypeError, "expected classes and tuples of classes, got %R", kind);
        return -1;
    }
    int match = 0;
    for (Py_ssize_t i = 0; match == 0 && i < PyTuple_Size(kind); i++) match = is_a(type, PyTuple_GetItem(kind, i));
    return match;
}

int walk_match(const walk *self, PyObject *kind) {
    for (size_t i = 0; i < self->classes.count; i++) {
        class_facts *const facts = self->classes.items[i];
        if ((facts->match = is_a(facts->type, kind)) < 0) return -1;
    }
    return 0;
}

static int append_kind(const walk *self, PyObject *kind, PyObject *list) {
    if (walk_match(self, kind) < 0) return -1;
    for (size_t i = 0; i < self->order_count; i++) {
        const node *next = &self->nodes[self->order[i]];
        if (next->facts->match && PyList_Append(list, next->module) < 0) return -1;
    }
    return 0;
}

PyObject *walk_list(walk *self, PyObject *const *kinds, Py_ssize_t count) {
    PyObject *result = PyTuple_New(count);
    for (Py_ssize_t k = 0; result != NULL && k < count; k++) {
        PyObject *list = PyList_New(0);
        if (list == NULL || PyTuple_SetItem(result, k, list) < 0 || append_kind(self, kinds[k], list) < 0) {
            Py_CLEAR(result);
        }
    }
    return result;
}

static PyObject *walk_find(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    if (count < 2) {
        PyErr_SetString(PyExc_TypeError, "find() takes a module and at least one class");
        return NULL;
    }
    walk self = {.state = state_of(module)};
    PyObject *result = walk_run(&self, args[0]) == 0 ? walk_list(&self, args + 1, count - 1) : NULL;
    walk_free(&self);
    return result;
}

/* --- the switches, on a list of layers --- */

/* 0 if the call has `wanted` arguments. */
static int expect(const char *name, Py_ssize_t count, Py_ssize_t wanted) {
    if (count == wanted) return 0;
    PyErr_Format(PyExc_TypeError, "%s() takes %zd arguments, got %zd", name, wanted, count);
    return -1;
}

static PyObject *switch_list(PyObject *module, int method, PyObject *list, PyObject *names, PyObject *flag) {
    const module_state *state = state_of(module);
    const int value = PyObject_IsTrue(flag);
    if (!PyList_Check(list)) PyErr_SetString(PyExc_TypeError, "expected a list of tuner layers");
    if (PyErr_Occurred()) return NULL;
    const size_t size = (size_t)PyList_Size(list);
    class_table classes = {0};
    container_pool pool = {0};
    tuned_layer *layers = PyMem_Calloc(size + 1, sizeof *layers), **all = PyMem_Calloc(size + 1, sizeof *all);
    int rc = layers != NULL && all != NULL ? 0 : -1;
    if (rc < 0) PyErr_NoMemory();
    for (size_t i = 0; rc == 0 && i < size; i++) {
        all[i] = &layers[i];
        rc = layer_open(state, &classes, PyList_GetItem(list, (Py_ssize_t)i), all[i]);
    }
    if (rc == 0) rc = layers_switch(state, method, all, size, &pool, names, value);
    for (size_t i = 0; layers != NULL && i < size; i++) layer_close(&layers[i]);
    PyMem_Free(layers);
    PyMem_Free(all);
    containers_free(&pool);
    class_table_free(&classes);
    if (rc < 0) return NULL;
    Py_RETURN_NONE;
}

static PyObject *walk_set_adapter(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    if (expect("set_adapter", count, 3) < 0) return NULL;
    return switch_list(module, SET_ADAPTER, args[0], args[1], args[2]);
}

static PyObject *walk_enable_adapters(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    if (expect("enable_adapters", count, 2) < 0) return NULL;
    return switch_list(module, ENABLE_ADAPTERS, args[0], NULL, args[1]);
}

static PyObject *walk_set_requires_grad(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    if (expect("set_requires_grad", count, 3) < 0) return NULL;
    return switch_list(module, SET_REQUIRES_GRAD, args[0], args[1], args[2]);
}

/* flags(layer, also, skip): [(tensor, requires_grad)], see layer_flags() */
static PyObject *walk_flags(PyObject *module, PyObject *const *args, Py_ssize_t count) {
    if (expect("flags", count, 3) < 0) return NULL;
    PyObject *skip = PySet_New(args[2]), *list = skip ? layer_flags(state_of(module), args[0], args[1], skip) : NULL;
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
