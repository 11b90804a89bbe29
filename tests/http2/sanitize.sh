#!/bin/sh
# Builds the HTTP/2 engine and its driver with the address and undefined-behaviour sanitizers, and runs it: make sanitize
set -e
root=$(cd "$(dirname "$0")/../.." && pwd)
out="$root/build/sanitize"
mkdir -p "$out"
"${CXX:-c++}" -std=c++17 -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all -o "$out/http2" \
  "$root/tests/http2/sanitize.cpp" "$root/runtime/csrc/http2.cpp" "$root/runtime/csrc/hpack.cpp"
ASAN_OPTIONS=detect_leaks=1 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 "$out/http2" "$@"
