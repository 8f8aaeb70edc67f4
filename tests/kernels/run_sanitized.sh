#!/usr/bin/env bash
# The kernels' self-test under AddressSanitizer and UndefinedBehaviorSanitizer.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
kernels=$here/../../csrc/kernels
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
"${CC:-gcc}" -std=c11 -ffp-contract=off -O1 -g -pthread -fsanitize=address,undefined -fno-sanitize-recover=undefined -I"$kernels" \
    "$kernels"/*.c "$here/shim.c" "$here/selftest.c" -lm -o "$out/selftest"
"$out/selftest" "${1:-10}"
