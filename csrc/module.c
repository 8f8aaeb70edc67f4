/* module.c: the module `peft_c._C`: init, and the list of units that bring their methods and types. */
#include "state.h"

#include "forward.h"
#include "gate.h"
#include "layer.h"
#include "merge.h"
#include "mixed.h"
#include "tree.h"
#include "view.h"
#include "walk.h"

/* A unit with functions adds one line here: X(its method table) */
#define METHOD_TABLES(X) \
    X(view_methods) \
    X(gate_methods) \
    X(forward_methods) \
    X(forward_raw_methods) X(terms_methods) X(mixed_methods) X(merge_methods) X(exchange_methods) X(walk_methods)

/* A unit with heap types or settings adds one line here: X(its init), int init(PyObject *module, module_state *state)
 */
#define UNIT_INITS(X) X(gate_init) X(layer_init) X(tree_init)

static int module_exec(PyObject *module) {
    module_state *state = state_of(module);
    if (state_init(state) < 0) return -1;
#define X(table) \
    if (PyModule_AddFunctions(module, table) < 0) return -1;
    METHOD_TABLES(X)
#undef X
#define X(init) \
    if (init(module, state) < 0) return -1;
    UNIT_INITS(X)
#undef X
    return 0;
}

static int module_traverse(PyObject *module, visitproc visit, void *arg) {
    const module_state *state = state_of(module);
    return state ? state_traverse(state, visit, arg) : 0;
}

static int module_clear(PyObject *module) {
    module_state *state = state_of(module);
    if (state != NULL) state_clear(state);
    return 0;
}

static void module_free(void *module) {
    (void)module_clear(module);
}

static PyModuleDef_Slot module_slots[] = {
    {Py_mod_exec, (void *)(uintptr_t)module_exec},
    {0, NULL},
};

static struct PyModuleDef module_def = {
    PyModuleDef_HEAD_INIT,          .m_name = "peft_c._C",   .m_doc = "The C core of peft_c.",
    .m_size = sizeof(module_state), .m_slots = module_slots, .m_traverse = module_traverse,
    .m_clear = module_clear,        .m_free = module_free,
};

PyMODINIT_FUNC PyInit__C(void);
PyMODINIT_FUNC PyInit__C(void) {
    return PyModuleDef_Init(&module_def);
}
