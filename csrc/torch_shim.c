/* torch_shim.c: finds libtorch_cpu in the running process and binds the symbols of torch_abi.h. */
#include "torch_shim.h"

#include <string.h>

#ifdef _WIN32
#include <windows.h>
#define LIBRARY "torch_cpu.dll"
#else
#include <dlfcn.h>
#ifdef __APPLE__
#define LIBRARY "libtorch_cpu.dylib"
#else
#define LIBRARY "libtorch_cpu.so"
#endif
#endif

#ifdef _WIN32
static void *library_open(const char *path) {
    return (void *)GetModuleHandleA(path);
}
static void *library_symbol(void *library, const char *name) {
    return (void *)(uintptr_t)GetProcAddress((HMODULE)library, name);
}
#else
static void *library_open(const char *path) {
    return dlopen(path, RTLD_NOLOAD | RTLD_LAZY);
}
static void *library_symbol(void *library, const char *name) {
    return dlsym(library, name);
}
#endif

/* The already loaded library: by its bare name, else beside the package torch. NULL without an exception if absent. */
static void *library_find(PyObject *torch) {
    void *library = library_open(LIBRARY);
    PyObject *paths = NULL, *path = NULL, *full = NULL, *bytes = NULL;
    if (library != NULL) return library;
    paths = PyObject_GetAttrString(torch, "__path__");
    path = paths ? PySequence_GetItem(paths, 0) : NULL;
    full = path ? PyUnicode_FromFormat("%U/lib/" LIBRARY, path) : NULL;
    bytes = full ? PyUnicode_EncodeFSDefault(full) : NULL;
    if (bytes != NULL) library = library_open(PyBytes_AsString(bytes));
    PyErr_Clear();
    Py_XDECREF(paths);
    Py_XDECREF(path);
    Py_XDECREF(full);
    Py_XDECREF(bytes);
    return library;
}

/* ImportError: what is missing, in which torch. Returns -1. */
static int missing(PyObject *torch, const char *what, const char *since) {
    PyObject *version = PyObject_GetAttrString(torch, "__version__");
    if (version == NULL) PyErr_Clear();
    PyErr_Format(PyExc_ImportError,
                 "peft_c needs torch >= " TORCH_MINIMUM ": the installed torch %S lacks %s (in torch since %s)",
                 version ? version : Py_None, what, since);
    Py_XDECREF(version);
    return -1;
}

/* torch.Tensor's exchange table of our DLPack major version, or NULL (no exception). */
static const dl_exchange_api *exchange_find(PyObject *torch) {
    const dl_exchange_header *header = NULL;
    PyObject *tensor = PyObject_GetAttrString(torch, "Tensor");
    PyObject *capsule = tensor ? PyObject_GetAttrString(tensor, "__dlpack_c_exchange_api__") : NULL;
    if (capsule != NULL) header = PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
    PyErr_Clear();
    Py_XDECREF(tensor);
    Py_XDECREF(capsule); /* the table it points to is static in torch */
    while (header != NULL && header->version.major != DL_MAJOR) header = header->previous;
    if (header == NULL || ((const dl_exchange_api *)(const void *)header)->tensor_from_object == NULL) return NULL;
    return (const dl_exchange_api *)(const void *)header;
}

int torch_shim_bind(torch_table *table, PyObject *torch) {
    void *library = NULL, *symbol = NULL;
    table->dlpack = exchange_find(torch);
    if (table->dlpack == NULL)
        return missing(torch, "torch.Tensor.__dlpack_c_exchange_api__ (DLPack 1)", TORCH_MINIMUM);
    library = library_find(torch);
    if (library == NULL) return missing(torch, "the library " LIBRARY, TORCH_MINIMUM);
#define X(name, result, parameters, version) \
    symbol = library_symbol(library, #name); \
    if (symbol == NULL) return missing(torch, #name " in " LIBRARY, version); \
    memcpy(&table->name, &symbol, sizeof symbol);
    TORCH_SYMBOLS(X)
#undef X
    return 0; /* the library stays open: torch never unloads it, and neither do we */
}

int torch_shim_threads(const torch_table *table) {
    uint32_t count = 1;
    if (table->torch_get_num_threads(&count) != 0 || count == 0) return 1;
    return (int)count;
}
