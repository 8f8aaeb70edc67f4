#!/usr/bin/env bash
# Cross-compiles the kernels for AArch64 and runs their self-test (NEON against generic) under user-mode emulation.
# Exit 77: skipped, the cross compiler or the emulator is not installed.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
kernels=$here/../../csrc/kernels
cc=${CC_AARCH64:-aarch64-linux-gnu-gcc}
qemu=$(command -v qemu-aarch64 || command -v qemu-aarch64-static || true)
if ! command -v "$cc" >/dev/null || [ -z "$qemu" ]; then
    echo "skipped: needs $cc and qemu-aarch64 (Debian: gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user)"
    exit 77
fi
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
"$cc" -std=c11 -ffp-contract=off -O2 -static -pthread -Wall -Wextra -Wshadow -Wconversion -Werror -I"$kernels" \
    "$kernels"/*.c "$here/shim.c" "$here/selftest.c" -lm -o "$out/selftest"
"$qemu" "$out/selftest" "${1:-10}"
