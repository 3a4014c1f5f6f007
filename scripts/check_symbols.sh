#!/bin/sh
# check_symbols.sh - the symbols of the built libraries are ours, and those of the list.
#
#   check_symbols.sh [--update] BUILD_DIR
#
# libkvfold.so: every exported symbol starts with kvf_, and the list equals tests/data/abi.txt, so
# that a symbol comes or goes only with a change of that file (--update writes it).
# libkvfold.a: every global symbol starts with kvf_, so that the archive clashes with no program.
#
# SPDX-License-Identifier: Apache-2.0
set -eu

update=0
if [ "${1:-}" = --update ]; then
    update=1
    shift
fi
if [ $# -ne 1 ]; then
    echo "usage: check_symbols.sh [--update] BUILD_DIR" >&2
    exit 2
fi
build=$1
list=$(dirname "$0")/../tests/data/abi.txt
for library in "$build/libkvfold.so" "$build/libkvfold.a"; do
    if [ ! -e "$library" ]; then
        echo "check_symbols: there is no $library; build first" >&2
        exit 2
    fi
done
found=$(mktemp)
trap 'rm -f "$found"' EXIT
status=0

# Sanitizers export names of their own; they start with two underscores.
nm -D --defined-only "$build/libkvfold.so" | awk '$2 != "A" { print $3 }' | sed 's/@.*//' |
    grep -v '^__' | LC_ALL=C sort -u >"$found"
if grep -v '^kvf_' "$found"; then
    echo "check_symbols: libkvfold.so exports the names above, which do not start with kvf_"
    status=1
fi
if [ $update = 1 ]; then
    cp "$found" "$list"
    echo "check_symbols: wrote $(wc -l <"$list") names to tests/data/abi.txt"
elif [ ! -e "$list" ]; then
    echo "check_symbols: there is no tests/data/abi.txt; make it with --update"
    status=1
elif ! diff -u "$list" "$found"; then
    echo "check_symbols: the exported symbols (+) are not those of tests/data/abi.txt (-)."
    echo "If that is meant, run: scripts/check_symbols.sh --update $build"
    status=1
fi

if nm -g --defined-only "$build/libkvfold.a" 2>/dev/null |
    awk 'NF == 3 { print $3 }' | grep -v -e '^kvf_' -e '^__' | LC_ALL=C sort -u | grep .; then
    echo "check_symbols: libkvfold.a defines the global names above, which do not start with kvf_"
    status=1
fi
[ $status = 0 ] && echo "check_symbols: $(wc -l <"$found") exported symbols, as listed"
exit $status
