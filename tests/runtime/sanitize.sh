#!/usr/bin/env bash
# The C code under AddressSanitizer and UndefinedBehaviorSanitizer: builds a copy of the tree in a temporary folder and runs the
# tests of the C code there. Arguments go to pytest in place of the default test folders. $PYTHON: the interpreter.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
case $python in */*) python=$(realpath -s "$python") ;; esac
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cp -r setup.py pyproject.toml csrc peft_c tests "$folder"
for file in README.md LICENSE; do [ ! -f $file ] || cp $file "$folder"; done
cd "$folder"
rm -f peft_c/_C*.so
PEFT_C_SANITIZE=1 "$python" setup.py -q build_ext --inplace

# torch throws C++ exceptions: the sanitizer must find libstdc++ before torch is loaded
export LD_PRELOAD="$(gcc -print-file-name=libasan.so):$(gcc -print-file-name=libstdc++.so.6)"
export ASAN_OPTIONS=detect_leaks=0:detect_odr_violation=0:allocator_may_return_null=1
export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
export PYTHONMALLOC=malloc PYTHONPATH="$folder" PEFT_C_SANITIZED=1
if [ $# = 0 ]; then
    set -- tests/runtime
    for folder_of_tests in tests/kernels tests/merge; do [ ! -d $folder_of_tests ] || set -- "$@" $folder_of_tests; done
fi
"$python" -m pytest -q -p no:cacheprovider -x "$@"
