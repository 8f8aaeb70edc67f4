/* module.c: module definition; every unit brings its own method table. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

static int module_exec(PyObject *module) {
    (void)module;
    return 0;
}

static PyModuleDef_Slot module_slots[] = {
    {Py_mod_exec, module_exec},
    {0, NULL},
};

static struct PyModuleDef module_def = {
    PyModuleDef_HEAD_INIT, .m_name = "peft_c._C", .m_doc = "The C core of peft_c.", .m_size = 0, .m_slots = module_slots,
};

PyMODINIT_FUNC PyInit__C(void) { return PyModuleDef_Init(&module_def); }
