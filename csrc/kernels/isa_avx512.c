/* isa_avx512.c: AVX-512 F+BW+DQ+VL with FMA and F16C (Skylake-X, Zen 4 and later). */
#if defined(__x86_64__)
#include "pragma_x86.h"
PK_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,popcnt")
#include "words_avx512.h"

#define ISA_TABLE pk_isa_avx512
#define ISA_NAME "avx512"
#define ISA_MATH 1
#include "isa.inc"
PK_TARGET_END
#else
typedef int pk_no_avx512;
#endif
