#!/usr/bin/env bash
# Runs the kernels' self-test (every instruction set against generic) with AVX-512 as SIMDe has it: on CPUs with AVX2.
# Exit 77: skipped, SIMDe is not installed or the CPU has no AVX2.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
kernels=$here/../../csrc/kernels
cc=${CC:-gcc}
if ! grep -qw avx2 /proc/cpuinfo || ! echo '#include <simde/x86/avx512.h>' | "$cc" -E -xc - >/dev/null 2>&1; then
    echo "skipped: needs SIMDe (Debian: libsimde-dev) and a CPU with AVX2"
    exit 77
fi
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
flags=(-std=c11 -ffp-contract=off -O2 -pthread -I"$kernels" '-D__builtin_cpu_supports(feature)=1')
for isa in avx512 avx512bf16; do
    "$cc" "${flags[@]}" -Wno-psabi -mavx2 -mfma -mf16c -mbmi -mbmi2 -mpopcnt -include "$here/emulated_avx512.h" \
        -c "$kernels/isa_$isa.c" -o "$out/$isa.o"
done
others=$(ls "$kernels"/*.c | grep -v isa_avx512)
"$cc" "${flags[@]}" $others "$here/shim.c" "$here/selftest.c" "$out"/*.o -lm -o "$out/selftest"
"$out/selftest" "${1:-10}"
