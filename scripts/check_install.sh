#!/bin/sh
# check_install.sh - what the build installs is enough to build a program with.
#
#   check_install.sh BUILD_DIR
#
# Installs into a temporary prefix, then builds examples/01_first_tokens.c against it three times:
# through pkg-config, through pkg-config --static, and through find_package(kvfold). Each result
# must start; so must the installed program.
#
# SPDX-License-Identifier: Apache-2.0
set -eu

if [ $# -ne 1 ]; then
    echo "usage: check_install.sh BUILD_DIR" >&2
    exit 2
fi
root=$(cd "$(dirname "$0")/.." && pwd)
build=$(cd "$1" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
prefix=$work/usr
example=$root/examples/01_first_tokens.c

cmake --install "$build" --prefix "$prefix" >"$work/install.log"
libdir=$(cd "$(dirname "$(find "$prefix" -name kvfold.pc)")/.." && pwd)
PKG_CONFIG_PATH=$libdir/pkgconfig
export PKG_CONFIG_PATH

# The example without arguments prints its usage and ends with 2: it was linked and it loads.
starts() {
    status=0
    "$@" >"$work/out" 2>&1 || status=$?
    if [ $status -ne 2 ]; then
        echo "check_install: $1 ended with $status instead of 2:"
        cat "$work/out"
        exit 1
    fi
}

# shellcheck disable=SC2046
cc -std=c11 "$example" $(pkg-config --cflags --libs kvfold) -o "$work/shared"
LD_LIBRARY_PATH=$libdir starts "$work/shared"
# shellcheck disable=SC2046
cc -std=c11 "$example" $(pkg-config --cflags kvfold) "$libdir/libkvfold.a" \
    $(pkg-config --static --libs kvfold | sed 's/-lkvfold//') -o "$work/static"
starts "$work/static"
echo "check_install: pkg-config works, shared and static"

mkdir "$work/app"
cat >"$work/app/CMakeLists.txt" <<END
cmake_minimum_required(VERSION 3.22)
project(app C)
find_package(kvfold 0.1 REQUIRED)
add_executable(app "$example")
target_link_libraries(app PRIVATE kvfold::kvfold)
add_executable(app_static "$example")
target_link_libraries(app_static PRIVATE kvfold::kvfold_static)
END
cmake -S "$work/app" -B "$work/app/build" -DCMAKE_PREFIX_PATH="$prefix" >"$work/cmake.log"
cmake --build "$work/app/build" >>"$work/cmake.log"
starts "$work/app/build/app"
starts "$work/app/build/app_static"
echo "check_install: find_package(kvfold) works, shared and static"

if [ -x "$prefix/bin/kvfold" ]; then
    "$prefix/bin/kvfold" --help >/dev/null
    python3 "$prefix/share/kvfold/fetch_model.py" --list >/dev/null
    echo "check_install: the installed program starts"
fi
