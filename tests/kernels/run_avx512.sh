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
"$cc" -std=c11 -ffp-contract=off -O2 -Wno-psabi -pthread -mavx2 -mfma -mf16c -mbmi -mbmi2 -mpopcnt -I"$kernels" \
    -include "$here/emulated_avx512.h" '-D__builtin_cpu_supports(feature)=1' \
    "$kernels"/*.c "$here/shim.c" "$here/selftest.c" -lm -o "$out/selftest"
"$out/selftest" "${1:-10}"
