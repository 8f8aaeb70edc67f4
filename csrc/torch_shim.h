/* torch_shim.h: torch's C symbols, bound late. Nothing is linked: torch must have been imported by Python first. */
#ifndef PEFT_C_TORCH_SHIM_H
#define PEFT_C_TORCH_SHIM_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "torch_abi.h"

/* One pointer a symbol of TORCH_SYMBOLS, under its own name, and torch's DLPack exchange table. */
typedef struct {
#define X(name, result, parameters, version) result(*name) parameters;
    TORCH_SYMBOLS(X)
#undef X
    const dl_exchange_api *dlpack;
} torch_table;

/* Fills `table` from the imported module `torch`. 0, or -1 with an ImportError that names the missing symbol, the
 * torch version found and the one needed. */
int torch_shim_bind(torch_table *table, PyObject *torch);

/* table->torch_parallel_for is a pk_parallel_fn: torch's own pool, serial inside itself and with one thread; needs no
 * GIL. torch.get_num_threads(), at least 1: */
int torch_shim_threads(const torch_table *table);

#endif
