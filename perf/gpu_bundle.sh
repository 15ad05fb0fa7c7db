#!/usr/bin/env bash
# Collects what a bare GPU machine lacks into gpu-bundle/: TensorRT's headers, the plugin library built for Ampere, Hopper
# and Blackwell where there is no nvcc, and small models for engines. perf/gpu_check.sh uses them where it finds them.
#
#   perf/gpu_bundle.sh [FOLDER]     FOLDER: gpu-bundle, which git ignores
#
# PYTHON is one with pifa_deploy and pip. TENSORRT_ROOT names a folder with TensorRT's headers; without it they are
# downloaded (1 MB). PIFA_ARCHS are the compute capabilities. Exit codes: 0 made, 1 not.
set -euo pipefail
cd "$(dirname "$0")/.."

out=${1:-gpu-bundle}
python=${PYTHON:-python3}
most_bytes=$((50 << 20))
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

mkdir -p "$(dirname "$out")"
new=$(mktemp -d "$(dirname "$out")/.gpu-bundle.XXXXXX")
trap 'rm -rf "$new"' EXIT
headers=${TENSORRT_ROOT:-$new/fetched}
[ -n "${TENSORRT_ROOT:-}" ] || "$python" plugins/cmake/fetch_headers.py "$headers"
[ -f "$headers/NvInferRuntime.h" ] || headers=$headers/include
mkdir "$new/bundle" "$new/bundle/tensorrt-headers"
cp "$headers"/NvInfer*.h "$new/bundle/tensorrt-headers/"
"$python" -m pifa_deploy.cli.main plugin build "$new/build" --archs "${PIFA_ARCHS:-80,90,120}" \
    --tensorrt-root "$new/bundle/tensorrt-headers"
cp "$new/build/libpifa_plugin.so" "$new/bundle/"
"$python" perf/bundle_models.py "$new/bundle/models"
bytes=$(du -sb "$new/bundle" | cut -f 1)
if [ "$bytes" -gt "$most_bytes" ]; then
    echo "gpu_bundle.sh: the bundle has $bytes bytes, expected at most $most_bytes; name fewer PIFA_ARCHS" >&2
    exit 1
fi
rm -rf "$out"
mv "$new/bundle" "$out"
echo "$out: $bytes bytes"
