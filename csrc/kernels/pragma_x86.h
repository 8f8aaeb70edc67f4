/* pragma_x86.h: compile the rest of a file for a CPU feature set, whatever the command line says. */
#ifndef PEFT_C_KERNELS_PRAGMA_X86_H
#define PEFT_C_KERNELS_PRAGMA_X86_H

#define PK_PRAGMA(x) _Pragma(#x)
#if defined(__clang__)
#define PK_TARGET_BEGIN(t) PK_PRAGMA(clang attribute push(__attribute__((target(t))), apply_to = function))
#define PK_TARGET_END PK_PRAGMA(clang attribute pop)
#else
#define PK_TARGET_BEGIN(t) PK_PRAGMA(GCC push_options) PK_PRAGMA(GCC target(t))
#define PK_TARGET_END PK_PRAGMA(GCC pop_options)
#endif

#endif
