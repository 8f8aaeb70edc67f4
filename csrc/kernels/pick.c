/* pick.c: which ISA runs. The one mutable word of the kernels is the atomic pointer to the chosen table. */
#include <stdatomic.h>
#include <string.h>

#include "internal.h"

static _Atomic(const pk_isa *) chosen = NULL;

#if defined(__x86_64__)
static int has_avx2(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
           __builtin_cpu_supports("popcnt");
}

static int has_avx512(void) {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

static int has_avx512bf16(void) {
    return has_avx512() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi") &&
           __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("bmi2");
}
#endif

int pk_cpu_is_measured(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    return __builtin_cpu_is("amd");
#else
    return 0;
#endif
}

/* the i-th available ISA, best first */
static const pk_isa *available(int i) {
    const pk_isa *list[4];
    int n = 0;
#if defined(__x86_64__)
    if (has_avx512bf16()) list[n++] = &pk_isa_avx512bf16;
    if (has_avx512()) list[n++] = &pk_isa_avx512;
    if (has_avx2()) list[n++] = &pk_isa_avx2;
#elif defined(__aarch64__)
    list[n++] = &pk_isa_neon;
#endif
    list[n++] = &pk_isa_generic;
    return i >= 0 && i < n ? list[i] : NULL;
}

const pk_isa *pk_isa_now(void) {
    const pk_isa *isa = atomic_load_explicit(&chosen, memory_order_acquire);
    if (!isa) {
        isa = available(0);
        atomic_store_explicit(&chosen, isa, memory_order_release);
    }
    return isa;
}

static int can(const pk_isa *isa, int math) {
    return math == MATH_PAIRS ? isa->pairs != NULL : isa->math == math;
}

const pk_isa *pk_isa_with_math(int math) {
    const pk_isa *isa = pk_isa_now();
    for (int i = 0; isa && !can(isa, math); i++) isa = available(i);
    return isa;
}

const char *pk_isa_list(int i) {
    const pk_isa *const isa = available(i);
    return isa ? isa->name : NULL;
}

const char *pk_isa_name(void) {
    return pk_isa_now()->name;
}

int pk_isa_select(const char *name) {
    const pk_isa *isa;
    for (int i = 0; (isa = available(i)) != NULL; i++)
        if (name && strcmp(isa->name, name) == 0) {
            atomic_store_explicit(&chosen, isa, memory_order_release);
            return 0;
        }
    return -1;
}
