#!/bin/sh
# install_packages.sh - install what kvfold needs and the machine lacks.
#
#   install_packages.sh [--fetch] [--docs] [--tests] [--all]
#
#   (none)    compiler, CMake, Ninja and the libraries of the library and the program
#   --fetch   and pip, through which scripts/fetch_model.py gets the known models
#   --docs    and the documents that the quickstart reads (debian-policy)
#   --tests   and Criterion
#   --all     and everything above, clang with its sanitizers, llvm's symbolizer, and MPI
#
# Only missing packages are installed: when nothing is missing there is no network access and no
# sudo. On a system without apt the packages to install are named; the exit status is then 1 if
# a tool or library is truly missing, 0 if all of them are there under whatever name.
#
# SPDX-License-Identifier: Apache-2.0
set -eu

build="gcc g++ cmake ninja-build pkg-config libpcre2-dev liblmdb-dev libfaiss-dev libopenblas-dev libxxhash-dev zlib1g-dev libcjson-dev libpoppler-glib-dev libxml2-dev libavformat-dev libavcodec-dev libavutil-dev libswscale-dev python3"
fetch="python3-pip"
docs="debian-policy"
tests="libcriterion-dev"
all="clang libclang-rt-dev llvm libopenmpi-dev openmpi-bin"

wanted=$build
with_tests=0
with_clang=0
for arg in "$@"; do
    case $arg in
    --fetch) wanted="$wanted $fetch" ;;
    --docs) wanted="$wanted $docs" ;;
    --tests) wanted="$wanted $tests" with_tests=1 ;;
    --all) wanted="$wanted $fetch $docs $tests $all" with_tests=1 with_clang=1 ;;
    -h | --help)
        sed -n '2,/^# SPDX/{/SPDX/d;s/^# \{0,1\}//;p}' "$0"
        exit 0
        ;;
    *)
        echo "install_packages.sh: unknown option '$arg'; see --help" >&2
        exit 2
        ;;
    esac
done

# pkg-config is provided by pkgconf on newer releases, so a package counts as there when dpkg
# knows it as installed or when the program it is wanted for runs.
have_package() {
    [ "$(dpkg-query -W -f='${db:Status-Status}' "$1" 2>/dev/null)" = installed ] && return 0
    case $1 in
    pkg-config) command -v pkg-config >/dev/null 2>&1 ;;
    python3-pip) python3 -m pip --version >/dev/null 2>&1 ;;
    *) return 1 ;;
    esac
}

install_debian() {
    missing=""
    for package in $wanted; do
        have_package "$package" || missing="$missing $package"
    done
    [ -n "$missing" ] || return 0

    sudo=""
    if [ "$(id -u)" -ne 0 ]; then
        if ! command -v sudo >/dev/null 2>&1; then
            echo "install_packages.sh: not root and no sudo. As root, run: apt-get install$missing" >&2
            exit 1
        fi
        sudo=sudo
    fi
    echo "Installing:$missing" >&2
    # Lists may be absent (fresh container) or stale (packages gone): try, refresh, try again.
    export DEBIAN_FRONTEND=noninteractive
    apt="$sudo env DEBIAN_FRONTEND=noninteractive apt-get -q -y"
    # shellcheck disable=SC2086
    if ! ls /var/lib/apt/lists/*_Packages* >/dev/null 2>&1 ||
        ! $apt install --no-install-recommends $missing >&2; then
        $apt update >&2
        $apt install --no-install-recommends $missing >&2
    fi
}

# What is missing by use, not by package name, for systems without apt.
missing_tools() {
    for tool in cc c++ cmake pkg-config python3; do
        command -v "$tool" >/dev/null 2>&1 || echo "$tool"
    done
    command -v pkg-config >/dev/null 2>&1 || return 0
    libraries="libpcre2-8 lmdb libxxhash zlib libcjson poppler-glib libxml-2.0"
    [ $with_tests = 0 ] || libraries="$libraries criterion"
    for library in $libraries; do
        pkg-config --exists "$library" || echo "$library"
    done
    [ $with_clang = 0 ] || command -v clang >/dev/null 2>&1 || echo clang
}

name_packages() {
    case $1 in
    *fedora* | *rhel* | *centos*)
        echo "sudo dnf install gcc gcc-c++ cmake ninja-build pkgconf-pkg-config pcre2-devel lmdb-devel xxhash-devel zlib-devel cjson-devel poppler-glib-devel libxml2-devel ffmpeg-free-devel python3 python3-pip criterion-devel clang compiler-rt llvm"
        ;;
    *arch* | *manjaro*)
        echo "sudo pacman -S --needed base-devel cmake ninja pkgconf pcre2 lmdb xxhash zlib cjson poppler-glib libxml2 ffmpeg python python-pip criterion clang compiler-rt llvm"
        ;;
    *suse*)
        echo "sudo zypper install gcc gcc-c++ cmake ninja pkgconf-pkg-config pcre2-devel lmdb-devel xxhash-devel zlib-devel cJSON-devel libpoppler-glib-devel libxml2-devel 'pkgconfig(libavformat)' 'pkgconfig(libavcodec)' 'pkgconfig(libavutil)' 'pkgconfig(libswscale)' python3 python3-pip criterion-devel clang llvm"
        ;;
    *darwin*)
        echo "brew install cmake ninja pkgconf pcre2 lmdb xxhash cjson poppler libxml2 ffmpeg python criterion"
        ;;
    *)
        echo "a C11 and a C++17 compiler, CMake 3.22, Ninja, pkg-config, PCRE2, LMDB 0.9, FAISS with its C headers (optional), xxHash, zlib, cJSON, poppler-glib, libxml2, FFmpeg's libraries (optional), Python 3 with pip, and for the tests Criterion"
        ;;
    esac
}

if command -v apt-get >/dev/null 2>&1 && command -v dpkg-query >/dev/null 2>&1; then
    install_debian
    exit 0
fi

missing=$(missing_tools | tr '\n' ' ')
[ -n "$missing" ] || exit 0
system=$(uname -s | tr '[:upper:]' '[:lower:]')
if [ -r /etc/os-release ]; then
    system=$(. /etc/os-release && echo "${ID:-} ${ID_LIKE:-}")
fi
{
    echo "install_packages.sh: missing here: $missing"
    echo "This script installs on Debian and its relatives only. On this system, install:"
    echo "    $(name_packages "$system")"
} >&2
exit 1
