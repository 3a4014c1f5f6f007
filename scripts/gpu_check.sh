#!/bin/sh
# gpu_check.sh - everything that needs a CUDA device, in one command: build, tests without skips,
# compute-sanitizer, ceilings and kernels beside their peers, whole models, a profile, and a table of it all.
#
#   gpu_check.sh [--quick] [--stage build|test|sanitize|bench|models|profile]... [--model FILE.gguf]... [BUILD_DIR]
#
# --model adds a model to the stage `models`, which without one measures the two small ones of the tests, if they
# are there; the figures of an 8B model want its Q4_K_M file (kvfold fetches none of that size).
# Without --stage all run, in this order. Results go to bench/results/cuda/<device>.{json,md}; the exit code
# is that of the first stage that failed (later stages still run), 77 where there is no device.
#
# SPDX-License-Identifier: Apache-2.0
set -u

root=$(cd "$(dirname "$0")/.." && pwd)
build=$root/build-gpu
quick=
stages=
models=
while [ $# -gt 0 ]; do
    case $1 in
    --quick) quick=--quick ;;
    --stage) [ $# -gt 1 ] || { echo "gpu_check: --stage needs a name" >&2; exit 2; }
             stages="$stages $2"; shift ;;
    --model) [ $# -gt 1 ] || { echo "gpu_check: --model needs a file" >&2; exit 2; }
             models="$models --model $2"; shift ;;
    -*) sed -n '2,12p' "$0" >&2; exit 2 ;;
    *) build=$1 ;;
    esac
    shift
done
[ -n "$stages" ] || stages="build test sanitize bench models profile"
status=0
failed=
export KVFOLD_REQUIRE_CUDA=1

fail() {
    echo "gpu_check: $1 failed ($2)" >&2
    failed="$failed $1"
    [ $status -ne 0 ] || status=$2
}

# The device's own architecture: one is compiled in half a minute, all in several.
arch() {
    cap=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 | tr -d '.')
    case $cap in
    '') echo dev ;;
    90) echo 90a-real ;;
    *) echo "$cap-real" ;;
    esac
}

stage_build() {
    cmake -S "$root" -B "$build" -DCMAKE_BUILD_TYPE=Release -DKVF_CUDA=ON -DKVF_CUDA_ARCHITECTURES="$(arch)" -DKVF_BENCH=ON &&
        cmake --build "$build" -j "$(nproc)"
}

stage_test() { ctest --test-dir "$build" -R cuda --output-on-failure; }

# Small shapes: the sanitizer is 10 to 100 times slower. racecheck looks at shared memory only.
stage_sanitize() {
    command -v compute-sanitizer >/dev/null || { echo "gpu_check: there is no compute-sanitizer" >&2; return 1; }
    rc=0
    for tool in memcheck racecheck synccheck; do
        for test in attn mm far kv device vision; do
            filter=
            [ $test = attn ] && filter='--filter=cuda_attn/few_*'
            [ $test = vision ] && filter='--filter=cuda_vision/norms_*'
            # Criterion runs each test in a child of its own.
            compute-sanitizer --tool $tool --target-processes all --error-exitcode 99 \
                "$build/tests/unit/test_cuda_$test" -j1 $filter || { echo "gpu_check: $tool, $test" >&2; rc=1; }
            [ -z "$quick" ] || break
        done
    done
    return $rc
}

stage_bench() {
    out=$build/gpu_check
    mkdir -p "$out"
    "$build/bench_cuda" $quick --json "$out/kernels.json" || return $?
    python3 "$root/bench/cuda_peers.py" $quick --json "$out/peers.json" || [ $? -eq 77 ] || return 1
    nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,power.limit --format=csv >"$out/device.csv" 2>/dev/null
    table
}

table() { python3 "$root/bench/bench_cuda_table.py" "$build/gpu_check" "$root/bench/results/cuda"; }

# Tokens a second, time to a first token, agreement with the CPU engine, blocks that stream.
stage_models() {
    mkdir -p "$build/gpu_check"
    # shellcheck disable=SC2086
    python3 "$root/bench/cuda_models.py" $quick $models --json "$build/gpu_check/models.json" "$build/tools/kvfold"
    rc=$?
    [ ! -e "$build/gpu_check/kernels.json" ] || table || return 1
    return $rc
}

stage_profile() {
    command -v ncu >/dev/null || { echo "gpu_check: there is no ncu; no profile" >&2; return 0; }
    mkdir -p "$build/gpu_check"
    ncu --set basic --kernel-name 'regex:prefill_kernel|decode_kernel|gemv_q8_kernel' --launch-count 12 \
        --csv "$build/bench_cuda" --quick >"$build/gpu_check/ncu.csv" 2>"$build/gpu_check/ncu.log" ||
        echo "gpu_check: ncu could not count (it may need rights); see $build/gpu_check/ncu.log" >&2
}

for stage in $stages; do
    case $stage in
    build | test | sanitize | bench | models | profile) ;;
    *) echo "gpu_check: there is no stage '$stage'" >&2; exit 2 ;;
    esac
done
if ! nvidia-smi -L 2>/dev/null | grep -q GPU; then
    command -v nvidia-smi >/dev/null && why="nvidia-smi lists none" || why="there is no nvidia-smi, so no driver either"
    echo "gpu_check: there is no CUDA device ($why); nothing was measured. Run this on a machine with one of compute" \
        "capability 8.0 or later; without, 'ctest -R cuda_emu' runs the same kernels on the CPU" >&2
    exit 77
fi
for stage in $stages; do
    echo "== $stage"
    "stage_$stage" || fail "$stage" $?
done
[ -z "$failed" ] && echo "gpu_check: passed" || echo "gpu_check: failed:$failed" >&2
exit $status
