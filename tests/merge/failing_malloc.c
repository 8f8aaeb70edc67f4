/* failing_malloc.c: preloaded, fails one allocation of at least LEAST bytes: the one that fail_after(n) says. */
#include <errno.h>
#include <stdatomic.h>
#include <stddef.h>

enum { LEAST = 4096 };
extern void *__libc_malloc(size_t size);
extern void *__libc_calloc(size_t count, size_t size);
extern void *__libc_realloc(void *old, size_t size);
extern void *__libc_memalign(size_t alignment, size_t size);

static atomic_long left = -1; /* allocations until the one that fails; negative: none does */

void fail_after(long n) {
    atomic_store(&left, n);
}

static int fails(size_t size) {
    return size >= LEAST && atomic_load(&left) >= 0 && atomic_fetch_sub(&left, 1) == 0;
}

void *malloc(size_t size) {
    return fails(size) ? NULL : __libc_malloc(size);
}

void *calloc(size_t count, size_t size) {
    return fails(count * size) ? NULL : __libc_calloc(count, size);
}

void *realloc(void *old, size_t size) {
    return fails(size) ? NULL : __libc_realloc(old, size);
}

int posix_memalign(void **to, size_t alignment, size_t size) {
    void *const p = fails(size) ? NULL : __libc_memalign(alignment, size);
    if (p) *to = p;
    return p ? 0 : ENOMEM;
}
