/* tree.c: see tree.h. */
#include "tree.h"

#include <string.h>

#include "layer.h"
#include "prefetch.h"
#include "walk.h"

typedef struct {
    walk walk;
    PyObject **items; /* owned: what the `_modules` of all nodes in the queue have: name, module, name, module ... */
    size_t item_count;
    tuned_layer *layers; /* the tuner layers, in order */
    size_t layer_count;
    container_pool pool; /* the containers of those that a switch has opened */
    footprint lines;     /* what the checks and the switches read, but for the adapters' entries */
    footprint past;      /* what the last switch has read of those */
    const PyObject *root;
    size_t traced; /* 1 + the number of containers that are in `lines`, as large as they are now */
    bool whole;    /* it was read without an error, and all of it can be checked */
} tree;

static void tree_clear(tree *self) {
    tree old = *self; /* nobody sees it half cleared */
    memset(self, 0, sizeof *self);
    for (size_t i = 0; i < old.item_count; i++) Py_DECREF(old.items[i]);
    for (size_t i = 0; i < old.layer_count; i++) layer_close(&old.layers[i]);
    PyMem_Free(old.items);
    PyMem_Free(old.layers);
    PyMem_Free(old.lines.items);
    PyMem_Free(old.past.items);
    containers_free(&old.pool);
    walk_free(&old.walk);
}

/* --- reading and checking --- */

/* Keeps the names and modules in all `_modules`. 0 if there is a node that has none of its own to be compared. */
static int keep_items(tree *self) {
    const walk *const found = &self->walk;
    size_t size = 0;
    for (size_t i = 0; i < found->queue_count; i++) {
        const node *at = &found->nodes[found->queue[i]];
        if (at->flat) return 0;
        size += 2 * (size_t)PyDict_Size(at->children);
    }
    if ((self->items = PyMem_Malloc((size + 1) * sizeof *self->items)) == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    for (size_t i = 0; i < found->queue_count; i++) {
        PyObject *const children = found->nodes[found->queue[i]].children, *name, *child;
        for (Py_ssize_t at = 0; self->item_count < size && PyDict_Next(children, &at, &name, &child);) {
            self->items[self->item_count++] = Py_NewRef(name);
            self->items[self->item_count++] = Py_NewRef(child);
        }
    }
    return self->item_count == size;
}

static int keep_layers(tree *self) {
    const walk *const found = &self->walk;
    size_t size = 0;
    for (size_t i = 0; i < found->order_count; i++) {
        const node *at = &found->nodes[found->order[i]];
        if (at->facts->layer) size++;
    }
    if ((self->layers = PyMem_Calloc(size + 1, sizeof *self->layers)) == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    for (size_t i = 0; i < found->order_count; i++) {
        const node *at = &found->nodes[found->order[i]];
        if (!at->facts->layer) continue;
        self->layers[self->layer_count++] =
            (tuned_layer){.facts = at->facts, .object = Py_NewRef(at->module), .dict = Py_NewRef(at->dict)};
    }
    return 0;
}

static int tree_read(tree *self, const module_state *state, PyObject *root) {
    tree_clear(self);
    self->walk.state = state;
    self->pool.past = &self->past;
    if (walk_run(&self->walk, root) < 0) return -1;
    node *const top = &self->walk.nodes[0];
    const int kept = top->facts->layer ? 0 : keep_items(self);
    if (kept < 0 || keep_layers(self) < 0) return -1;
    self->root = root;
    self->whole = kept;
    self->walk.root_borrowed = true; /* it owns the tree */
    Py_DECREF(root);
    Py_CLEAR(top->dict);
    return 0;
}

enum { AHEAD = 16 }; /* modules for which memory is asked for in advance */

/* 1 if the modules and what they have in `_modules` are the same. The root is the caller's and may have been moved. */
static int same_modules(const tree *self, PyObject *root) {
    const walk *const found = &self->walk;
    PyObject *const *item = self->items, *name, *child;
    size_t asked = 0;
    for (size_t i = 0; i < found->queue_count; i++) {
        asked = footprint_ask(&self->lines, asked, i + AHEAD, found->queue_count);
        const node *at = &found->nodes[found->queue[i]];
        PyObject *const module = i ? at->module : root;
        if (Py_TYPE(module) != at->facts->type) return 0;
        PyObject *dict = PyObject_GenericGetDict(module, NULL);
        if (dict == NULL) return -1;
        PyObject *children = dict_get(dict, found->state->names._modules, &at->facts->hints[MODULES]);
        const int same = children == at->children && (i == 0 || dict == at->dict);
        Py_DECREF(dict);
        if (!same) return PyErr_Occurred() ? -1 : 0;
        Py_ssize_t position = 0, left = PyDict_Size(children);
        if (left == 0) continue;
        if (2 * left > self->items + self->item_count - item) return 0;
        for (; left-- > 0 && PyDict_Next(children, &position, &name, &child); item += 2) {
            if (name != item[0] || child != item[1]) return 0;
        }
    }
    return item == self->items + self->item_count;
}

/* 1 if `layer` declares the containers that were opened, or hidden from the walk. */
static int same_containers(const module_state *state, tuned_layer *layer) {
    class_facts *const facts = layer->facts;
    if (layer_is_plain(state, layer) && (layer->names == NULL || layer->names == facts->attributes[LAYER_NAMES]))
        return layer->names == NULL || layer->steady;
    PyObject *names = layer_attribute(state, facts, layer->object, layer->dict, LAYER_NAMES);
    PyObject *others = names ? layer_attribute(state, facts, layer->object, layer->dict, PARAM_NAMES) : NULL;
    int same = others ? 1 : -1;
    if (layer->names != NULL)
        same = same > 0 ? layer->steady && names == layer->names : same;
    else if (same > 0)
        same = names == facts->attributes[LAYER_NAMES];
    if (same > 0) same = others == facts->attributes[PARAM_NAMES];
    Py_XDECREF(names);
    Py_XDECREF(others);
    return same;
}

static void trace_all(tree *self) {
    self->lines.count = 0;
    walk_trace(&self->walk, &self->lines);
    for (size_t i = 0; i < self->layer_count; i++) layer_trace(&self->layers[i], &self->pool, &self->lines);
    self->traced = self->pool.count + 1;
}

/* 1 if what was kept holds, 0 if not, -1 with an exception. */
static int tree_holds(tree *self, const module_state *state, PyObject *root) {
    if (!self->whole || self->root != root) return 0;
    int same = classes_same(state, &self->walk.classes);
    if (same > 0) same = same_modules(self, root);
    for (size_t i = 0; same > 0 && i < self->layer_count; i++) same = same_containers(state, &self->layers[i]);
    if (same > 0 && containers_measure(&self->pool)) self->traced = 0;
    return same;
}

/* --- choosing --- */

/* Some modules, in order. */
typedef struct {
    tuned_layer **items;
    size_t count;
    tuned_layer *others; /* those that are no tuner layers */
    size_t other_count;
} selection; /* starts as zeros */

static void selection_free(selection *self) {
    for (size_t i = 0; i < self->other_count; i++) layer_close(&self->others[i]);
    PyMem_Free(self->others);
    PyMem_Free(self->items);
}

/* Marks what modules of the class `wrappers` have as children: they switch it themselves. */
static int mark_held(const walk *found, PyObject *wrappers, bool *held) {
    if (walk_match(found, wrappers) < 0) return -1;
    for (size_t i = 0; i < found->order_count; i++) {
        const node *at = &found->nodes[found->order[i]];
        if (!at->facts->match) continue;
        for (size_t k = 0; k < at->count; k++) held[found->edges[at->first + k]] = true;
    }
    return 0;
}

/* Selects the modules of `kind`, without those that modules of the class `wrappers` (NULL: none) hold. */
static int tree_select(tree *self, PyObject *kind, PyObject *wrappers, selection *chosen) {
    walk *const found = &self->walk;
    int rc = -1;
    bool *held = PyMem_Calloc(found->node_count + 1, sizeof *held);
    chosen->items = PyMem_Malloc((found->order_count + 1) * sizeof *chosen->items);
    if (held == NULL || chosen->items == NULL) {
        PyErr_NoMemory();
        goto done;
    }
    if (wrappers != NULL && mark_held(found, wrappers, held) < 0) goto done;
    if (walk_match(found, kind) < 0) goto done;
    size_t others = 0, layer = 0;
    for (size_t i = 0; i < found->order_count; i++) {
        const node *at = &found->nodes[found->order[i]];
        others += at->facts->match && !at->facts->layer;
    }
    if (others && (chosen->others = PyMem_Calloc(others, sizeof *chosen->others)) == NULL) {
        PyErr_NoMemory();
        goto done;
    }
    for (size_t i = 0; i < found->order_count; i++) {
        const node *at = &found->nodes[found->order[i]];
        tuned_layer *own = at->facts->layer ? &self->layers[layer++] : NULL;
        if (!at->facts->match || held[found->order[i]]) continue;
        if (own == NULL) {
            own = &chosen->others[chosen->other_count++];
            if (layer_open(found->state, &found->classes, at->module, own) < 0) goto done;
        }
        chosen->items[chosen->count++] = own;
    }
    rc = 0;
done:
    PyMem_Free(held);
    return rc;
}

/* The selected layers that have something merged: new list. */
static PyObject *list_merged(const module_state *state, const selection *chosen) {
    PyObject *list = PyList_New(0);
    for (size_t i = 0; list != NULL && i < chosen->count; i++) {
        const tuned_layer *at = chosen->items[i];
        PyObject *merged = layer_attribute(state, at->facts, at->object, at->dict, MERGED_NAMES);
        const int any = merged ? PyObject_IsTrue(merged) : -1;
        if (any < 0 || (any && PyList_Append(list, at->object) < 0)) Py_CLEAR(list);
        Py_XDECREF(merged);
    }
    return list;
}

/* --- the Python type --- */

typedef struct {
    PyObject_HEAD tree kept;
    bool busy;
} tree_object;

/* What a method does with a tree that holds; `args` are those after the model. */
typedef PyObject *(*action)(tree *self, PyObject *const *args, Py_ssize_t count);

/* Checks the arguments and the tree, or reads it again, and acts on it, or on a tree of this call's own while another
 * one uses the kept one. */
static PyObject *act(PyObject *object, PyTypeObject *cls, PyObject *const *args, Py_ssize_t count, Py_ssize_t wanted,
                     const char *usage, action what) {
    if (wanted >= 0 ? count != wanted : count < -wanted) return PyErr_Format(PyExc_TypeError, "expected %s", usage);
    tree_object *const self = (tree_object *)object;
    const module_state *state = (const module_state *)PyType_GetModuleState(cls);
    const bool busy = self->busy;
    tree own, *const used = busy ? &own : &self->kept;
    memset(&own, 0, sizeof own);
    self->busy = true;
    const int holds = tree_holds(used, state, args[0]);
    const int rc = holds == 0 ? tree_read(used, state, args[0]) : holds;
    PyObject *result = rc < 0 ? NULL : what(used, args + 1, count - 1);
    if (busy || rc < 0 || !used->whole) tree_clear(used);
    if (used->whole && used->traced != used->pool.count + 1) trace_all(used);
    if (!busy) self->busy = false;
    return result;
}

static PyObject *find(tree *self, PyObject *const *args, Py_ssize_t count) {
    return walk_list(&self->walk, args, count);
}

/* Whether the adapters of all selected modules are enabled; "irregular" if of some, None without any: new reference. */
static PyObject *enabled_now(const module_state *state, const selection *chosen) {
    int on = 0, off = 0;
    for (size_t i = 0; i < chosen->count; i++) {
        tuned_layer *const at = chosen->items[i];
        PyObject *flag = dict_get(at->dict, state->names._disable_adapters, &at->facts->hints[DISABLED]);
        if (flag == NULL && PyErr_Occurred()) return NULL;
        flag = flag ? Py_NewRef(flag) : PyObject_GetAttr(at->object, state->names.disable_adapters);
        const int is_off = flag ? PyObject_IsTrue(flag) : -1;
        Py_XDECREF(flag);
        if (is_off < 0) return NULL;
        on |= !is_off;
        off |= is_off;
    }
    if (on && off) return PyUnicode_FromString("irregular");
    return Py_NewRef(on ? Py_True : off ? Py_False : Py_None);
}

/* set_adapter(model, classes, wrappers, names, inference_mode) */
static PyObject *set_adapter(tree *self, PyObject *const *args, Py_ssize_t count) {
    (void)count;
    selection chosen = {0};
    PyObject *merged = NULL, *lists = NULL, *result = NULL;
    const int flag = PyObject_IsTrue(args[3]);
    if (flag < 0 || tree_select(self, args[0], NULL, &chosen) < 0) goto done;
    if (args[1] != Py_None) {
        if ((merged = list_merged(self->walk.state, &chosen)) == NULL) goto done;
        if ((lists = walk_list(&self->walk, &args[1], 1)) == NULL) goto done;
        if (PyList_Size(merged) || PyList_Size(PyTuple_GetItem(lists, 0))) {
            result = PyTuple_Pack(2, merged, PyTuple_GetItem(lists, 0));
            goto done;
        }
    }
    if (layers_switch(self->walk.state, SET_ADAPTER, chosen.items, chosen.count, &self->pool, args[2], flag) == 0) {
        result = Py_NewRef(Py_None);
    }
done:
    selection_free(&chosen);
    Py_XDECREF(merged);
    Py_XDECREF(lists);
    return result;
}

/* set_requires_grad(model, classes, names, requires_grad) */
static PyObject *set_requires_grad(tree *self, PyObject *const *args, Py_ssize_t count) {
    (void)count;
    selection chosen = {0};
    const int flag = PyObject_IsTrue(args[2]);
    const module_state *state = self->walk.state;
    int rc = flag < 0 ? -1 : tree_select(self, args[0], NULL, &chosen);
    if (rc == 0) rc = layers_switch(state, SET_REQUIRES_GRAD, chosen.items, chosen.count, &self->pool, args[1], flag);
    selection_free(&chosen);
    return rc < 0 ? NULL : Py_NewRef(Py_None);
}

/* enable_adapters(model, classes, wrappers, enabled, irregular) */
static PyObject *enable_adapters(tree *self, PyObject *const *args, Py_ssize_t count) {
    (void)count;
    const module_state *state = self->walk.state;
    selection chosen = {0}, all = {0};
    PyObject *before = NULL, *merged = NULL, *result = NULL;
    const int flag = PyObject_IsTrue(args[2]), irregular = PyObject_IsTrue(args[3]);
    if (flag < 0 || irregular < 0 || tree_select(self, args[0], args[1], &chosen) < 0) goto done;
    const bool holders = chosen.other_count > 0; /* what they hold is looked at, too, though they switch it */
    if (holders && tree_select(self, args[0], NULL, &all) < 0) goto done;
    if ((before = enabled_now(state, holders ? &all : &chosen)) == NULL) goto done;
    if ((merged = list_merged(state, &chosen)) == NULL) goto done;
    if ((irregular || !PyUnicode_Check(before)) &&
        layers_switch(state, ENABLE_ADAPTERS, chosen.items, chosen.count, &self->pool, NULL, flag) < 0)
        goto done;
    result = PyTuple_Pack(2, before, merged);
done:
    selection_free(&all);
    selection_free(&chosen);
    Py_XDECREF(before);
    Py_XDECREF(merged);
    return result;
}

/* For copies and pickles: a tree without anything. */
static PyObject *tree_reduce(PyObject *self, PyObject *none) {
    (void)none;
    PyObject *arguments = PyTuple_New(0);
    PyObject *result = arguments ? PyTuple_Pack(2, (PyObject *)Py_TYPE(self), arguments) : NULL;
    Py_XDECREF(arguments);
    return result;
}

/* X(method, arguments (negative: at least), how to call it, documentation) */
#define METHODS_OF_TREE(X) \
    X(find, -2, "find(model, *classes)", \
      "For each class (or tuple of classes) the list of its instances among model.modules(), in that order,\n" \
      "leaving out what lies in the adapter containers of tuner layers.") \
    X(set_adapter, 5, "set_adapter(model, classes, others, names, inference_mode)", \
      "module.set_adapter(names, inference_mode) for all modules of `classes`: all or none. Unless `others` is\n" \
      "None: where some of them are merged, or modules of `others` exist, changes nothing and returns both lists.") \
    X(set_requires_grad, 4, "set_requires_grad(model, classes, names, requires_grad)", \
      "module.set_requires_grad(names, requires_grad) for all modules of `classes`: all or none.") \
    X(enable_adapters, 5, "enable_adapters(model, classes, wrappers, enabled, irregular)", \
      "module.enable_adapters(enabled) for all modules of `classes` that are no children of `wrappers`: all or\n" \
      "none. Returns what was enabled before (True, False, None without any, or \"irregular\" where they differ;\n" \
      "unless `irregular`, nothing changes then) and the list of those with merged adapters.")

#define X(method, wanted, usage, doc) \
    static PyObject *tree_##method(PyObject *self, PyTypeObject *cls, PyObject *const *args, Py_ssize_t count, \
                                   PyObject *keywords) { \
        if (keywords != NULL) count = 0; \
        return act(self, cls, args, count, wanted, usage, method); \
    }
METHODS_OF_TREE(X)
#undef X

#define X(method, wanted, usage, doc) \
    {#method, (PyCFunction)(void (*)(void))tree_##method, METH_METHOD | METH_FASTCALL | METH_KEYWORDS, doc},
static PyMethodDef tree_methods[] = {METHODS_OF_TREE(X){"__reduce__", tree_reduce, METH_NOARGS, "A new, empty tree."},
                                     {NULL, NULL, 0, NULL}};
#undef X

static int tree_traverse(PyObject *object, visitproc visit, void *arg) {
    const tree *const self = &((tree_object *)object)->kept;
    Py_VISIT(Py_TYPE(object));
    for (size_t i = 0; i < self->item_count; i++) Py_VISIT(self->items[i]);
    for (size_t i = 0; i < self->layer_count; i++) {
        Py_VISIT(self->layers[i].object);
        Py_VISIT(self->layers[i].dict);
        Py_VISIT(self->layers[i].modules);
    }
    for (size_t i = 0; i < self->pool.count; i++) {
        Py_VISIT(self->pool.items[i].object);
        Py_VISIT(self->pool.items[i].dict);
        Py_VISIT(self->pool.items[i].order);
        Py_VISIT(self->pool.items[i].entries);
    }
    for (size_t i = 0; i < self->walk.node_count; i++) {
        if (i > 0 || !self->walk.root_borrowed) Py_VISIT(self->walk.nodes[i].module);
        Py_VISIT(self->walk.nodes[i].dict);
        Py_VISIT(self->walk.nodes[i].children);
    }
    return 0;
}

static int tree_forget(PyObject *object) {
    tree_clear(&((tree_object *)object)->kept);
    return 0;
}

static void tree_dealloc(PyObject *object) {
    PyTypeObject *const type = Py_TYPE(object);
    PyObject_GC_UnTrack(object);
    tree_clear(&((tree_object *)object)->kept);
    ((freefunc)(uintptr_t)PyType_GetSlot(type, Py_tp_free))(object);
    Py_DECREF(type);
}

static PyType_Slot tree_slots[] = {
    {Py_tp_doc, "Where the tuner layers of a model are, kept from call to call and checked in each; see csrc/tree.h."},
    {Py_tp_methods, tree_methods},
    {Py_tp_traverse, (void *)(uintptr_t)tree_traverse},
    {Py_tp_clear, (void *)(uintptr_t)tree_forget},
    {Py_tp_dealloc, (void *)(uintptr_t)tree_dealloc},
    {0, NULL},
};

static PyType_Spec tree_spec = {
    .name = "peft_c._C.Tree",
    .basicsize = sizeof(tree_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .slots = tree_slots,
};

int tree_init(PyObject *module, module_state *state) {
    state->types.Tree = PyType_FromModuleAndSpec(module, &tree_spec, NULL);
    return state->types.Tree ? PyModule_AddObjectRef(module, "Tree", state->types.Tree) : -1;
}
