#!/usr/bin/env bash
# Everything that needs a GPU, in one command and under 10 minutes: builds the kernels with nvcc alone, runs the gpu tests,
# the plugin's enqueue, compute-sanitizer and the benchmarks, and prints a short table last. Wants nvcc, g++, Python with
# PyTorch and pytest; no network, no CMake, no TensorRT. What `make gpu-bundle` collected is used where it is there.
#
#   perf/gpu_check.sh [--out DIR] [--seconds N]     DIR: perf/results/gpu; N: at most so long in all, 580; a fifth to build
#
# A stage that takes longer than its share is ended and "not decided". Results are written after every stage.
# Exit codes: 0 passed, 1 a check failed, 3 not decided (no GPU, no time, or a tool does not work), 4 the build failed.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2

out=perf/results/gpu
seconds=580
while [ $# -gt 0 ]; do
    case "$1" in
    --out) out=${2:?--out wants a folder}; shift 2 ;;
    --seconds) seconds=${2:?--seconds wants a number}; shift 2 ;;
    *) echo "gpu_check.sh: unknown argument $1; expected --out DIR or --seconds N" >&2; exit 2 ;;
    esac
done
mkdir -p "$out"
out=$(cd "$out" && pwd)
rm -f "$out"/{environment,tests,sanitizer,engines}.txt "$out"/bench_linear.{json,md,png}
rm -f "$out"/{bench_model,engines}.json "$out/summary.md"
python=${PYTHON:-python3}
bundle=$PWD/gpu-bundle
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
trap 'exit 143' TERM INT
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONDONTWRITEBYTECODE=1 MPLCONFIGDIR="$build"

stages=()
verdict=0
summary() {
    echo "| stage | result | detail |"
    echo "|---|---|---|"
    printf '%s\n' "${stages[@]}"
    if [ -f "$out/bench_linear.md" ]; then
        echo
        head -n 2 "$out/bench_linear.md"
        grep -E '\| 0\.5 \| (1|16|2048) \|' "$out/bench_linear.md"
        tail -n 1 "$out/bench_linear.md"
    fi
    local log
    for log in "$build/model.log" "$out/engines.txt"; do
        [ -s "$log" ] || continue
        echo
        grep '^|' "$log"
    done
}

# note STAGE RESULT DETAIL: RESULT is passed, failed or "not decided".
note() {
    stages+=("| $1 | $2 | $(printf %s "$3" | tr '|\n' '/ ') |")
    case "$2" in
    failed) verdict=1 ;;
    "not decided") [ "$verdict" -eq 0 ] && verdict=3 ;;
    esac
    summary >"$out/summary.md"
    echo "== $1: $2 ($3)"
}

finish() {
    echo
    cat "$out/summary.md"
    exit "${1:-$verdict}"
}

# The shares of the stages add up to more than there is; what is kept for the last one, one layer, they do not get.
reserve=$((seconds / 5))

# within SECONDS COMMAND...: runs it in its share of what is left; 124 when that is over.
within() {
    local limit=$1 left=$((seconds - SECONDS - reserve))
    shift
    [ "$limit" -lt "$left" ] || limit=$left
    [ "$limit" -gt 0 ] || return 124
    timeout -k 5 "$limit" "$@"
}

# judge STAGE STATUS DETAIL: turns an exit status into a result.
judge() {
    case "$2" in
    0) note "$1" passed "$3" ;;
    3) note "$1" "not decided" "$3" ;;
    124 | 137) note "$1" "not decided" "its time was over; $3" ;;
    *) note "$1" failed "exit code $2; $3" ;;
    esac
}

nvcc=${CUDACXX:-$(command -v nvcc || ls -d /usr/local/cuda*/bin/nvcc 2>/dev/null | tail -n 1)}
capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 | tr -d '. ')
case "$capability" in '' | *[!0-9]*) capability="" ;; esac
arch=${capability:-90}
headers=""
for folder in "$bundle/tensorrt-headers" "${TENSORRT_ROOT:-/nowhere}" "${TENSORRT_ROOT:-/nowhere}/include"; do
    [ -n "$headers" ] || [ ! -f "$folder/NvInferRuntime.h" ] || headers=$folder
done
{
    date -u +%FT%TZ
    nvidia-smi 2>&1 || true
    [ -z "$nvcc" ] || "$nvcc" --version
    "$python" -c 'import torch, sys; print(sys.version); print("torch", torch.__version__, "cuda", torch.version.cuda)'
    echo "TensorRT headers: ${headers:+found}"
} >"$out/environment.txt" 2>&1

# Compiles everything at once, then links; without TensorRT's headers the library has the kernels only.
compile() {
    local jobs=() job status=0 flags=(-std=c++17 -O3 -gencode "arch=compute_$arch,code=sm_$arch" -Xcompiler -fPIC)
    one() { "$nvcc" "${flags[@]}" "${@:2}" -c "$1" -o "$build/$(basename "$1").o" >"$build/$(basename "$1").log" 2>&1; }
    one plugins/pifaLinear/pifaLinear.cu -Xptxas -v & jobs+=($!)
    one plugins/pifaLinear/cooperativeProducts.cu -Xptxas -v & jobs+=($!)
    one plugins/pifaLinear/cublasLtProduct.cu & jobs+=($!)
    one plugins/tests/kernelsSanitizer.cu -lineinfo & jobs+=($!)
    if [ -n "$headers" ]; then
        local include=(-isystem "$headers" -I plugins/pifaLinear "-DPIFA_BUILD_ARCHS=\"$arch\"")
        for file in plugins/pifaLinear/*.cpp; do
            one "$file" "${include[@]}" & jobs+=($!)
        done
        one plugins/tests/host.cpp "${include[@]}" -DPIFA_HOST_CUDA & jobs+=($!)
    fi
    for job in "${jobs[@]}"; do wait "$job" || status=1; done
    [ $status -eq 0 ] || return 1
    local kernels=("$build"/{pifaLinear,cooperativeProducts,cublasLtProduct}.cu.o) link=("$nvcc" -cudart static) layer=()
    [ -z "$headers" ] || layer=("$build"/pifaLinear*.cpp.o)
    "${link[@]}" -shared "${kernels[@]}" "${layer[@]}" -ldl -o "$build/libpifa_plugin.so" \
        -Xlinker --version-script=plugins/cmake/exports.map >"$build/link.log" 2>&1 || return 1
    "${link[@]}" "$build/kernelsSanitizer.cu.o" "${kernels[@]}" -ldl -o "$build/sanitizer" >>"$build/link.log" 2>&1 || return 1
    [ -z "$headers" ] || "${link[@]}" "$build/host.cpp.o" -ldl -lpthread -o "$build/host" >>"$build/link.log" 2>&1
}
export -f compile
export nvcc arch build headers

began=$SECONDS
status=124 missing="nvcc was not found"
if [ -n "$nvcc" ]; then
    within $((seconds / 5)) bash -c compile
    status=$?
    missing="its time was over; sm_$arch with $nvcc"
fi
if [ "$status" -ne 124 ] && [ "$status" -ne 137 ]; then
    if [ $status -ne 0 ]; then
        tail -n 20 "$build"/*.log
        note build failed "exit code $status; sm_$arch with $nvcc"
        finish 4
    fi
    library=$build/libpifa_plugin.so
    cat "$build"/{pifaLinear,cooperativeProducts}.cu.log >"$build/ptxas.log"
    spills=$(grep -c -E ' [1-9][0-9]* bytes spill stores' "$build/ptxas.log")
    most=$(grep -o -E 'Used [0-9]+ registers' "$build/ptxas.log" | grep -o -E '[0-9]+' | sort -n | tail -n 1)
    note build passed "sm_$arch in $((SECONDS - began)) s, $spills kernels spill, at most $most registers"
elif [ -f "$bundle/libpifa_plugin.so" ]; then
    library=$bundle/libpifa_plugin.so
    rm -f "$build"/{host,sanitizer} # perhaps half linked
    note build "not decided" "$missing; the library of gpu-bundle is used"
else
    note build "not decided" "$missing; install the CUDA toolkit, set CUDACXX, or bring gpu-bundle"
    finish 3
fi

export PIFA_PLUGIN_LIBRARY="$library"
within 40 "$python" - >"$build/load.log" 2>&1 <<'PYTHON'
import torch
from pifa_deploy.cuda_kernels import KernelPath, KernelProblem, Kernels
from pifa_deploy.plugin_library import find_library
kernels = Kernels(find_library())
problem = KernelProblem(dtype=torch.float16, tokens=1000, in_features=64, out_features=96, rank=32)
print(f"1000 tokens go to {kernels.chosen_path(problem).name.lower()}; GEMM: {kernels.check(problem, KernelPath.GEMM) or 'ok'}")
PYTHON
status=$?
judge load $status "$(tail -n 1 "$build/load.log")"
[ $status -eq 0 ] || finish

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    note tests "not decided" "no GPU"
    finish 3
fi

# tests SECONDS STAGE ARGUMENTS...
tests() {
    local began=$SECONDS
    within "$1" "$python" -m pytest -p no:cacheprovider -q -m gpu "${@:3}" >"$build/tests.log" 2>&1
    local status=$?
    { echo "== $2"; cat "$build/tests.log"; } >>"$out/tests.txt"
    [ $status -eq 0 ] || tail -n 40 "$build/tests.log"
    # pytest is content when everything was skipped.
    [ $status -ne 0 ] || grep -q -E '[0-9]+ passed' "$build/tests.log" || status=3
    judge "$2" $status "$(tail -n 1 "$build/tests.log"); $((SECONDS - began)) s"
}
if "$python" -c 'import pytest' 2>/dev/null; then
    kernel_tests=(--noconftest tests/test_kernels_gpu.py)
    tests 100 "tests" "${kernel_tests[@]}" -k "not two_to_the_31"
    tests 40 "beyond 2^31 elements" "${kernel_tests[@]}" -k "two_to_the_31"
    # The other tests that are marked gpu need the whole package.
    mapfile -t others < <(grep -l 'mark\.gpu' tests/test_*.py | grep -v test_kernels_gpu)
    if "$python" -c 'import click, onnx, onnx_ir, onnxruntime, transformers' 2>/dev/null; then
        tests 60 "tests of the package" "${others[@]}"
    else
        note "tests of the package" "not decided" "click, onnx, onnx_ir, onnxruntime and transformers are not all installed"
    fi
else
    note tests "not decided" "$python has no pytest"
fi

# cuBLASLt as PyTorch ships it, for programs that PyTorch is not part of.
folder=$("$python" - <<'PYTHON'
from pathlib import Path
import torch
root = Path(torch.__file__).parents[1] / "nvidia"
print(next((str(path.parent) for path in sorted(root.rglob("libcublasLt.so*"))), ""))
PYTHON
)
export LD_LIBRARY_PATH="${folder:+$folder:}${LD_LIBRARY_PATH:-}"

# program SECONDS STAGE COMMAND...: its last line is the detail.
program() {
    within "$1" "${@:3}" >"$build/tool.log" 2>&1
    local status=$?
    { echo "== $2, exit code $status"; tail -n 60 "$build/tool.log"; } >>"$out/sanitizer.txt"
    judge "$2" $status "$(tail -n 1 "$build/tool.log")"
}
if [ -x "$build/host" ]; then
    program 30 "plugin enqueue" "$build/host" "$library" --cuda
else
    note "plugin enqueue" "not decided" "no TensorRT headers or no nvcc; bring what make gpu-bundle collects"
fi
sanitizer=$(command -v compute-sanitizer || ls -d /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | tail -n 1)
[ ! -x "$build/sanitizer" ] || program 20 "exact buffers" "$build/sanitizer" 2000
for tool in memcheck racecheck initcheck synccheck; do
    if [ -z "$sanitizer" ] || [ ! -x "$build/sanitizer" ]; then
        note "$tool" "not decided" "compute-sanitizer was not found, or nothing was built"
        continue
    fi
    within 25 "$sanitizer" --tool "$tool" --error-exitcode 9 "$build/sanitizer" 96 >"$build/tool.log" 2>&1
    status=$?
    { echo "== $tool, exit code $status"; tail -n 60 "$build/tool.log"; } >>"$out/sanitizer.txt"
    detail=$(grep -E 'ERROR SUMMARY|RACECHECK SUMMARY' "$build/tool.log" | tail -n 1 | tr -d '=')
    if grep -q -E 'Device not supported|Unable to find injection|not supported on' "$build/tool.log"; then
        status=3 detail="compute-sanitizer does not work on this machine"
    fi
    judge "$tool" $status "$detail"
done

# Engines of a small model, built and run here where TensorRT is installed.
models=$bundle/models
if [ -d "$models" ]; then
    within 90 "$python" perf/check_engine.py "$models" --library "$library" --out "$out/engines.json" \
        >"$out/engines.txt" 2>"$build/error.log"
    judge "engines" $? "$(cat "$out/engines.txt" "$build/error.log" | tail -n 1)"
else
    note "engines" "not decided" "there is no gpu-bundle/models; make gpu-bundle where there is a network"
fi

within 60 "$python" perf/bench_model.py --library "$library" --out "$out/bench_model.json" --seconds 35 \
    >"$build/model.log" 2>"$build/error.log"
judge "whole decoders" $? "$(tail -n 1 "$build/error.log")$(grep -h 'no GPU' "$build/model.log")"
within 40 "$python" perf/bench_compress.py --out "$build/compress.json" >"$build/compress.log" 2>"$build/error.log"
judge "compress, GPU against CPU" $? "$(cat "$build/compress.log" "$build/error.log" | tail -n 1)"
"$python" - "$out/bench_model.json" "$build/compress.json" <<'PYTHON' 2>/dev/null
import json, sys
from pathlib import Path
target, compress = map(Path, sys.argv[1:])
report = json.loads(target.read_text()) if target.exists() else {}
target.write_text(json.dumps({**report, "compress": json.loads(compress.read_text())}, indent=1) + "\n")
PYTHON

# The longest and the last: it has all the time that is left, and writes as it goes.
reserve=0
began=$SECONDS
left=$((seconds - SECONDS))
within "$left" "$python" perf/bench_linear.py --library "$library" --out "$out" --seconds $((left - 30)) >"$build/bench.log" 2>&1
judge "one layer" $? "$((SECONDS - began)) s; $(tail -n 1 "$build/bench.log")"
finish
