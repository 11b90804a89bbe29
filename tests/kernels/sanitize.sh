#!/bin/sh
# Builds the CPU kernels and their driver with the address and undefined-behaviour sanitizers, and runs it: make sanitize
set -e
root=$(cd "$(dirname "$0")/../.." && pwd)
out="$root/build/sanitize"
cmake -S "$root/tests/kernels" -B "$out" -DCMAKE_BUILD_TYPE=RelWithDebInfo >/dev/null
cmake --build "$out" --parallel 2 >/dev/null
ASAN_OPTIONS=detect_leaks=1 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 "$out/sanitize"
