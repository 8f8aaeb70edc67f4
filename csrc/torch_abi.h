/* torch_abi.h: the part of DLPack 1.x and of torch's C shim that this extension uses, declared by hand.
 *
 * torch's own shim headers are C++; nothing of torch is needed at build time. Sources of the declarations:
 * ATen/dlpack.h (DLPack 1.3) and torch/csrc/stable/c/shim.h, torch/csrc/inductor/aoti_torch/c/shim.h. */
#ifndef PEFT_C_TORCH_ABI_H
#define PEFT_C_TORCH_ABI_H

#include <stdbool.h>
#include <stdint.h>

/* ---- DLPack ---- */

enum { DL_CPU = 1, DL_CUDA_HOST = 3 };                                                      /* DLDeviceType */
enum { DL_INT = 0, DL_UINT = 1, DL_FLOAT = 2, DL_BFLOAT = 4, DL_COMPLEX = 5, DL_BOOL = 6 }; /* DLDataTypeCode */
enum { DL_FLAG_READ_ONLY = 1, DL_MAJOR = 1 };

typedef struct {
    uint32_t major, minor;
} dl_version;

typedef struct {
    int32_t type, id;
} dl_device;

typedef struct {
    uint8_t code, bits;
    uint16_t lanes;
} dl_dtype;

typedef struct {
    void *data;
    dl_device device;
    int32_t ndim; /* with ndim 0, shape and strides may be NULL */
    dl_dtype dtype;
    int64_t *shape;
    int64_t *strides; /* in elements; NULL (before DLPack 1.2): contiguous */
    uint64_t byte_offset;
} dl_tensor;

typedef struct dl_managed {
    dl_tensor tensor;
    void *context;
    void (*deleter)(struct dl_managed *);
} dl_managed; /* capsule "dltensor" */

typedef struct dl_managed_versioned {
    dl_version version;
    void *context;
    void (*deleter)(struct dl_managed_versioned *);
    uint64_t flags;
    dl_tensor tensor;
} dl_managed_versioned; /* capsule "dltensor_versioned" */

typedef struct dl_exchange_header {
    dl_version version;
    struct dl_exchange_header *previous;
} dl_exchange_header;

typedef struct {
    dl_exchange_header header;
    void (*managed_tensor_allocator)(void);
    int (*managed_from_object)(void *object, dl_managed_versioned **out);
    int (*managed_to_object)(dl_managed_versioned *tensor, void **out);
    int (*tensor_from_object)(void *object, dl_tensor *out); /* borrowed; may be NULL as a member */
    void (*current_work_stream)(void);
} dl_exchange_api; /* capsule "dlpack_exchange_api" on torch.Tensor, torch >= 2.10 */

/* ---- torch's C shim ---- */

typedef void (*torch_range_fn)(int64_t begin, int64_t end, void *context);

/* X(name, result, parameters, first torch version that has it); an int32_t result is 0 on success */
#define TORCH_SYMBOLS(X) \
    X(torch_parallel_for, int32_t, \
      (int64_t begin, int64_t end, int64_t grain, torch_range_fn function, void *context), "2.10") \
    X(torch_get_num_threads, int32_t, (uint32_t * count), "2.10") \
    X(aoti_torch_grad_mode_is_enabled, bool, (void), "2.4")

#define TORCH_MINIMUM "2.10"

#endif
