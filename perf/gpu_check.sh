#!/usr/bin/env bash
# Everything that needs a GPU, in one command: builds the kernels with nvcc alone, runs the gpu tests, compute-sanitizer
# and the benchmark, and prints a short table last. Wants nvcc, Python with PyTorch and pytest, g++; no network, no CMake,
# no TensorRT. Under 10 minutes.
#
#   perf/gpu_check.sh [--out DIR] [--seconds N]     DIR: perf/results/gpu; N: time of the benchmark, 240
#
# Exit codes: 0 passed, 1 a check failed, 3 not decided (no GPU, or a tool does not work here), 4 the build failed.
set -uo pipefail
cd "$(dirname "$0")/.."

out=perf/results/gpu
seconds=240
while [ $# -gt 0 ]; do
    case "$1" in
    --out) out=${2:?--out wants a folder}; shift 2 ;;
    --seconds) seconds=${2:?--seconds wants a number}; shift 2 ;;
    *) echo "gpu_check.sh: unknown argument $1; expected --out DIR or --seconds N" >&2; exit 2 ;;
    esac
done
mkdir -p "$out"
out=$(cd "$out" && pwd)
python=${PYTHON:-python3}
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONDONTWRITEBYTECODE=1

stages=()
verdict=0
# note STAGE RESULT DETAIL: RESULT is passed, failed or "not decided".
note() {
    stages+=("$1|$2|$3")
    case "$2" in
    failed) verdict=1 ;;
    "not decided") [ "$verdict" -eq 0 ] && verdict=3 ;;
    esac
    echo "== $1: $2 ($3)"
}

finish() {
    {
        echo "| stage | result | detail |"
        echo "|---|---|---|"
        for stage in "${stages[@]}"; do
            IFS='|' read -r name result detail <<<"$stage"
            echo "| $name | $result | $detail |"
        done
        if [ -f "$out/bench_linear.md" ]; then
            echo
            head -n 2 "$out/bench_linear.md"
            grep -E '\| 0\.5 \| (1|16|2048) \|' "$out/bench_linear.md"
            tail -n 1 "$out/bench_linear.md"
        fi
    } >"$out/summary.md"
    echo
    cat "$out/summary.md"
    exit "${1:-$verdict}"
}

nvcc=${CUDACXX:-$(command -v nvcc || ls -d /usr/local/cuda*/bin/nvcc 2>/dev/null | tail -n 1)}
if [ -z "$nvcc" ]; then
    note build "not decided" "nvcc was not found; install the CUDA toolkit or set CUDACXX"
    finish 3
fi
capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 | tr -d '. ')
case "$capability" in '' | *[!0-9]*) capability="" ;; esac
arch=${capability:-90}
{
    date -u +%FT%TZ
    nvidia-smi 2>&1 || true
    "$nvcc" --version
    "$python" -c 'import torch, sys; print(sys.version); print("torch", torch.__version__, "cuda", torch.version.cuda)'
} >"$out/environment.txt" 2>&1

began=$SECONDS
flags=(-std=c++17 -O3 -gencode "arch=compute_$arch,code=sm_$arch" -cudart static)
kernels=(plugins/pifaLinear/pifaLinear.cu plugins/pifaLinear/cublasLtProduct.cu)
"$nvcc" "${flags[@]}" -shared -Xcompiler -fPIC -Xptxas -v "${kernels[@]}" -ldl -o "$build/libpifa_kernels.so" \
    >"$build/library.log" 2>&1 &
library=$!
"$nvcc" "${flags[@]}" -lineinfo plugins/tests/kernelsSanitizer.cu "${kernels[@]}" -ldl -o "$build/sanitizer" \
    >"$build/sanitizer.log" 2>&1
program_status=$?
wait "$library"
if [ $? -ne 0 ] || [ $program_status -ne 0 ]; then
    tail -n 20 "$build"/*.log
    note build failed "sm_$arch with $nvcc"
    finish 4
fi
spills=$(grep -c -E ' [1-9][0-9]* bytes spill stores' "$build/library.log")
note build passed "sm_$arch in $((SECONDS - began)) s, $spills kernels spill registers"

export PIFA_PLUGIN_LIBRARY="$build/libpifa_kernels.so"
if ! "$python" - >"$build/load.log" 2>&1 <<'PYTHON'; then
import torch
from pifa_deploy.cuda_kernels import KernelPath, KernelProblem, Kernels
from pifa_deploy.plugin_library import find_library
kernels = Kernels(find_library())
problem = KernelProblem(dtype=torch.float16, tokens=1000, in_features=64, out_features=96, rank=32)
print(f"1000 tokens go to {kernels.chosen_path(problem).name.lower()}; GEMM: {kernels.check(problem, KernelPath.GEMM) or 'ok'}")
PYTHON
    tail -n 5 "$build/load.log"
    note load failed "the library does not load under $python"
    finish 1
fi
note load passed "$(tail -n 1 "$build/load.log")"

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    note tests "not decided" "no GPU"
    finish 3
fi

began=$SECONDS
if "$python" -c 'import pytest' 2>/dev/null; then
    timeout 200 "$python" -m pytest --noconftest -p no:cacheprovider -q -m gpu tests/test_kernels_gpu.py \
        >"$out/tests.txt" 2>&1
    status=$?
    detail="$(tail -n 1 "$out/tests.txt"); $((SECONDS - began)) s"
    if [ $status -ne 0 ]; then note tests failed "$detail"; tail -n 40 "$out/tests.txt"; else note tests passed "$detail"; fi
else
    note tests "not decided" "$python has no pytest"
fi

# cuBLASLt as PyTorch ships it, for a program that PyTorch is not part of.
folder=$("$python" - <<'PYTHON'
from pathlib import Path
import torch
root = Path(torch.__file__).parents[1] / "nvidia"
print(next((str(path.parent) for path in sorted(root.rglob("libcublasLt.so*"))), ""))
PYTHON
)
export LD_LIBRARY_PATH="${folder:+$folder:}${LD_LIBRARY_PATH:-}"
timeout 60 "$build/sanitizer" 2000 >"$out/sanitizer.txt" 2>&1
if [ $? -eq 0 ]; then result=passed; else result=failed; fi
note "exact buffers" "$result" "$(tail -n 1 "$out/sanitizer.txt")"

sanitizer=$(command -v compute-sanitizer || ls -d /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | tail -n 1)
for tool in memcheck racecheck initcheck synccheck; do
    if [ -z "$sanitizer" ]; then
        note "$tool" "not decided" "compute-sanitizer was not found"
        continue
    fi
    timeout 60 "$sanitizer" --tool "$tool" --error-exitcode 9 "$build/sanitizer" 96 >"$build/tool.log" 2>&1
    status=$?
    { echo "== $tool, exit code $status"; tail -n 60 "$build/tool.log"; } >>"$out/sanitizer.txt"
    detail=$(grep -E 'ERROR SUMMARY|RACECHECK SUMMARY' "$build/tool.log" | tail -n 1 | tr -d '=')
    if grep -q -E 'Device not supported|Unable to find injection|not supported on' "$build/tool.log"; then
        note "$tool" "not decided" "compute-sanitizer does not work on this machine"
    elif [ $status -eq 124 ]; then
        note "$tool" "not decided" "took more than 60 s"
    elif [ $status -eq 0 ]; then
        note "$tool" passed "$detail"
    else
        note "$tool" failed "exit code $status;$detail"
    fi
done

left=$((560 - SECONDS))
[ "$seconds" -lt "$left" ] || seconds=$((left - 20))
began=$SECONDS
timeout "$left" "$python" perf/bench_linear.py --library "$PIFA_PLUGIN_LIBRARY" --out "$out" --seconds "$seconds" \
    >"$build/bench.log" 2>&1
if [ $? -eq 0 ]; then
    note benchmark passed "$((SECONDS - began)) s"
else
    tail -n 20 "$build/bench.log"
    note benchmark failed "$(tail -n 1 "$build/bench.log" | tr '|' '/')"
fi
finish
